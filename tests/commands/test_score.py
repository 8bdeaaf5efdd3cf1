from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.cli import main, parse
from megatron_bupo.commands.score import GivenResponse, read_policy, read_scoring
from megatron_bupo.errors import InputError

ROW = {"input_ids": [1, 2, 3, 4], "prompt_length": 2}


@pytest.fixture
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir()  # 4 layers, 64 tokens, 256 positions


def command(folder: Path, model: Path, *more: str, rows: str | None = None) -> list[str]:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n" if rows is None else rows)
    files = ["--data", str(folder / "rows.jsonl"), "--out", str(folder / "out.jsonl")]
    return ["score", "--model", str(model), *files, *more]


def arguments(folder: Path, model: Path, *more: str) -> Namespace:
    return parse(command(folder, model, *more))


def test_the_command_line_becomes_a_scoring(tmp_path: Path, model: Path):
    more = ["--policy", "layer=2", "--read-out-norm", "parallel.tp=2", "parallel.pp=2"]
    scoring = read_scoring(arguments(tmp_path, model, *more))
    assert scoring.policy == InternalLayerPolicy(2, read_out_norm=True)
    assert scoring.responses == (GivenResponse((1, 2, 3, 4), 2),)
    assert scoring.ready.layout.world == 4
    assert scoring.ready.architecture.layers == 4
    assert scoring.ready.config.model.path == str(model)
    assert scoring.out == tmp_path / "out.jsonl"


def test_scoring_needs_neither_tokenizer_nor_a_batch_that_divides(tmp_path: Path, model: Path):
    assert not (model / "tokenizer.json").exists()
    read_scoring(arguments(tmp_path, model, "trainer.microbatch_size=7"))


def test_a_model_path_is_taken_as_it_is_written(tmp_path: Path):
    odd = tmp_path / "a: b {c} #d"
    with pytest.raises(InputError, match=r"a: b \{c\} #d: no such directory"):
        read_scoring(arguments(tmp_path, odd))


@pytest.mark.parametrize(
    ("text", "norm", "policy"),
    [
        ("full", False, FULL),
        ("layer=1", False, InternalLayerPolicy(1)),
        ("layer=3", True, InternalLayerPolicy(3, read_out_norm=True)),
    ],
)
def test_policies_are_read(text: str, norm: bool, policy: Any):
    assert read_policy(text, 4, read_out_norm=norm) == policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("layer=0", "--policy layer=0: the model has 4 layers; choose 1..3"),
        ("layer=5", "--policy layer=5: the model has 4 layers; choose 1..3"),
        (
            "layer=4",
            (
                "--policy layer=4: is the last layer of a 4-layer model, whose policy is the full "
                "policy; choose full, or layer=1..3"
            ),
        ),
        ("layer", "--policy layer: is not a policy; write full, or layer=N with N in 1..3"),
        ("layer=x", "--policy layer=x: is not a policy; write full, or layer=N with N in 1..3"),
    ],
)
def test_a_policy_that_is_none_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], policy: str, message: str
):
    assert main(command(tmp_path, model, "--policy", policy)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_full_policy_has_one_read_out_only(tmp_path: Path, model: Path):
    with pytest.raises(InputError, match=r"^--read-out-norm: the full policy is "):
        read_scoring(arguments(tmp_path, model, "--read-out-norm"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "is not JSON ("),
        ("[" * 100_000, "is not JSON ("),
        ("[1]", "is not an object with input_ids and prompt_length; write {"),
        ('{"input_ids": [1]}', "is not an object with input_ids and prompt_length; write {"),
        ('{"input_ids": "1", "prompt_length": 1}', "input_ids must be a list of integers and "),
        ('{"input_ids": [1.5], "prompt_length": 1}', "input_ids must be a list of integers and "),
        ('{"input_ids": [1], "prompt_length": true}', "input_ids must be a list of integers and "),
        ('{"input_ids": [64], "prompt_length": 1}', "token id 64 is outside the vocabulary; use "),
        ('{"input_ids": [-1], "prompt_length": 1}', "token id -1 is outside the vocabulary; use "),
        ('{"input_ids": [1], "prompt_length": 0}', "prompt_length=0 of 1 tokens; choose 1..1: "),
        ('{"input_ids": [1], "prompt_length": 2}', "prompt_length=2 of 1 tokens; choose 1..1: "),
        (
            json.dumps({"input_ids": [1] * 257, "prompt_length": 1}),
            "257 tokens exceed the model's 256 positions; shorten the row",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], row: str, reason: str
):
    rows = f"{json.dumps(ROW)}\n\n{row}\n"
    assert main(command(tmp_path, model, rows=rows)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'rows.jsonl'}: line 3: {reason}")
    assert error.count("\n") == 1


def test_lines_of_other_systems_and_with_any_character_are_read(tmp_path: Path, model: Path):
    odd = json.dumps(ROW | {"text": "a\u2028b\x85c"}, ensure_ascii=False)
    scoring = read_scoring(parse(command(tmp_path, model, rows=f"\ufeff{odd}\r\n{odd}\r\n")))
    assert [r.input_ids for r in scoring.responses] == [tuple(ROW["input_ids"])] * 2


def test_a_file_without_rows_is_refused(tmp_path: Path, model: Path):
    with pytest.raises(InputError, match=r"rows\.jsonl: has no rows"):
        read_scoring(parse(command(tmp_path, model, rows="\n")))


def test_an_out_file_without_a_folder_is_refused(tmp_path: Path, model: Path):
    out = tmp_path / "none" / "out.jsonl"
    with pytest.raises(InputError, match=r"^--out .*/none/out\.jsonl: .*none is not a directory"):
        read_scoring(arguments(tmp_path, model, "--out", str(out)))
