from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.rewards.exact_match import exact_match
from megatron_bupo.rewards.functions import absolute, arguments_of, resolve
from megatron_bupo.rewards.math_answers import math
from megatron_bupo.types import Prompt, Rollout

PROMPT = Prompt(3, (4, 10), "13", "4+9=", {"data_source": "sums", "extra_info": {"n": 2}})
ROLLOUT = Rollout(PROMPT, (1, 3, 14), "13$", (-0.1,) * 3, (0.2,) * 3, "stop", 0)


def call(function):
    args, kwargs = arguments_of(function, "fn").of(ROLLOUT)
    return function(*args, **kwargs)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_built_in_rules_go_by_their_names() -> None:
    assert resolve("math") is math
    assert resolve("exact_match") is exact_match


def test_a_function_is_found_by_module_and_by_file(tmp_path, monkeypatch) -> None:
    assert resolve("operator:eq")("a", "a") is True
    write(tmp_path / "mine.py", "from beside import half\ndef fn(r, a): return half * (r == a)\n")
    write(tmp_path / "beside.py", "half = 0.5\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert resolve(f"{tmp_path}/mine.py:fn")("7", "7") == 0.5
    assert resolve("mine.py:fn")("7", "8") == 0.0
    write(tmp_path / "installed_nowhere.py", "def fn(r, a): return 2.0\n")
    assert resolve("installed_nowhere:fn")("7", "8") == 2.0


def test_a_file_keeps_its_meaning_after_a_change_of_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("sub/mine.py:fn") == f"{tmp_path}/sub/mine.py:fn"
    assert absolute("pkg.mine:fn") == "pkg.mine:fn"
    assert absolute("math") == "math"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("maths", "neither built in nor an import path"),
        ("operator.eq", "neither built in nor an import path"),
        (":fn", "neither built in nor an import path"),
        ("operator:", "neither built in nor an import path"),
        ("nowhere_at_all:fn", "there is no module nowhere_at_all"),
        ("operator.nowhere:fn", "there is no module operator.nowhere"),
        ("nowhere.py:fn", "there is no file"),
        ("operator:equals", "operator has no equals"),
        ("sys:maxsize", "is a int, not a function"),
        ("{dir}/needs.py:fn", "raises ModuleNotFoundError: No module named 'needed_thing'"),
        ("{dir}/broken.py:fn", "raises ZeroDivisionError: division by zero"),
        ("{dir}/quits.py:fn", "raises SystemExit: 3"),
        ("{dir}/syntax.py:fn", "raises SyntaxError"),
        ("{dir}/fine.py:gn", "has no gn; it defines fn"),
        ("{dir}/fine.py:one", "cannot be called as fn(response, answer)"),
        ("{dir}/fine.py:swapped", "cannot be called as fn(response, answer)"),
        ("{dir}/fine.py:greedy", "has parameters that nothing fills: temperature"),
    ],
)
def test_a_function_that_does_not_import_is_named_with_the_reason(
    tmp_path, monkeypatch, name: str, says: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path / "needs.py", "import needed_thing\ndef fn(r, a): return 0\n")
    write(tmp_path / "broken.py", "1 / 0\n")
    write(tmp_path / "quits.py", "raise SystemExit(3)\n")
    write(tmp_path / "syntax.py", "def fn(:\n")
    fine = "def fn(r, a): return 0\ndef one(r): ...\ndef swapped(answer, text): ...\n"
    write(tmp_path / "fine.py", fine + "def greedy(response, answer, temperature): ...\n")
    name = name.format(dir=tmp_path)
    with pytest.raises(InputError) as caught:
        arguments_of(resolve(name), name)
    assert str(caught.value).startswith(f"reward.function={name}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_response_and_answer_come_first_whatever_they_are_called() -> None:
    assert call(lambda text, gold: (text, gold)) == ("13$", "13")
    assert call(lambda *both: both) == ("13$", "13")
    assert call(lambda text, gold, weight=2.0: (text, gold, weight)) == ("13$", "13", 2.0)


def test_response_and_answer_are_passed_by_name_where_both_are_named() -> None:
    assert call(lambda answer, response: (answer, response)) == ("13", "13$")
    assert call(lambda prompt, *, response, answer: (prompt, response, answer)) == (
        "4+9=",
        "13$",
        "13",
    )


def test_further_parameters_are_filled_by_name() -> None:
    def function(response, answer, *, row, prompt, response_ids, finish_reason, **others):
        return response, answer, row["extra_info"]["n"], prompt, response_ids, finish_reason, others

    assert call(function) == ("13$", "13", 2, "4+9=", [1, 3, 14], "stop", {})


def test_a_function_written_for_verl_is_called_as_verl_calls_it() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        return data_source, solution_str, ground_truth, extra_info

    assert call(compute_score) == ("sums", "13$", "13", {"n": 2})
