from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.check_rewards import main

pytestmark = pytest.mark.slow


def write(path: Path, *answers: str) -> str:
    rows = [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_that_cannot_be_graded_are_named_with_file_and_row(tmp_path, capsys) -> None:
    file = write(tmp_path / "a.jsonl", "7", "Yes", r"2^{\aleph_0}", "Yes", r"\frac{1}{2", "1/2")
    out = tmp_path / "report.json"
    assert main([file, "--json", str(out), "--function", "math", "--function", "exact_match"]) == 1
    of_math, of_strings = json.loads(out.read_text())
    assert (of_math["rows"], of_math["right"], of_math["string"]) == (6, 5 / 6, 2 / 6)
    assert (of_math["constant"], of_math["constant_answer"]) == (2 / 6, "Yes")
    assert of_strings["string"] is None
    assert [wrong["answer"] for wrong in of_math["wrong"]] == [r"\frac{1}{2"]
    told = capsys.readouterr().out
    assert f"{file} row 5" in told
    assert f"{file} row 3" in told


def test_answers_that_are_all_right_are_an_exit_code_of_0(tmp_path, capsys) -> None:
    file = write(tmp_path / "a.jsonl", "7", "8")
    assert main([file, "--function", "exact_match quirks=true"]) == 0
    assert main([file, "--function", "exact_match quirk=true"]) == 2
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "reward.options.quirk: is no option of exact_match" in capsys.readouterr().err
