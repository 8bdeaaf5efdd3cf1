from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.bed import chain_sums
from megatron_bupo.cli import main, parse
from megatron_bupo.commands.analyze import read_analysis, take_up
from megatron_bupo.errors import InputError

ROWS = [{"input_ids": [4, 10, 9], "prompt_length": 1}, {"input_ids": [5, 6], "prompt_length": 1}]


@pytest.fixture
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    model_dir = tiny_model_dir(vocab=16, scale=0.15)  # 4 layers, 256 positions
    if not (model_dir / "tokenizer.json").exists():
        chain_sums.save_tokenizer(model_dir)
    return model_dir


def command(folder: Path, model: Path, *more: str, rows: list[Any] = ROWS) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    return ["analyze", "--model", str(model), *more]


def given(folder: Path) -> list[str]:
    return ["--responses", str(folder / "rows.jsonl"), "--out", str(folder / "out")]


def refused(argv: list[str]) -> str:
    with pytest.raises(InputError) as error:
        read_analysis(parse(argv))
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 2], "prompt_length": 2}, "row 3: its response is empty"),
        ({"input_ids": [1, 16], "prompt_length": 1}, "line 3: token id 16 is outside"),
        ({"input_ids": [1, 2], "prompt_length": 0}, "line 3: prompt_length=0 of 2 tokens"),
        ({"input_ids": [1] * 257, "prompt_length": 1}, "line 3: 257 tokens exceed"),
        ({"input_ids": "12", "prompt_length": 1}, "line 3: input_ids must be a list"),
        ({"text": "1+2=3"}, "line 3: is not an object with input_ids"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, model: Path, row: Any, says: str):
    argv = command(tmp_path, model, *given(tmp_path), rows=[*ROWS, row])
    assert says in refused(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data", "prompts.jsonl"], "both name what to read"),
        (["parallel.tp=3"], "parallel.tp=3: does not divide"),
        (["parallel.pp=5"], "parallel.pp=5"),
        (["rollout.temperature=0.7"], "leave rollout.temperature at 1"),
        (["rollout.top_p=0.9"], "leave rollout.top_p at 1"),
        (["--read-out", "both"], "invalid choice: 'both'"),
        (["--prompts", "0"], "0 is not a number from 1 up"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, model: Path, more: list[str], says: str
):
    assert says in refused(command(tmp_path, model, *given(tmp_path), *more))


def test_there_must_be_something_to_read(tmp_path: Path, model: Path):
    assert "there is nothing to read" in refused(command(tmp_path, model, "--out", "x"))


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path, model: Path):
    data = str(tmp_path / "prompts.jsonl")
    argv = command(tmp_path, model, "--data", data, "--out", str(tmp_path / "out"))
    assert "lower data.max_prompt_tokens or rollout.max_response_tokens" in refused(argv)


def test_a_directory_of_something_else_is_left_alone(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert main(command(tmp_path, model, *given(tmp_path))) == 2
    assert "holds thesis.tex, and no analysis; choose a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "rows", "says"),
    [
        (["--read-out", "norm"], ROWS, '--read-out="raw", which is now "norm"'),
        (["--per-token"], ROWS, "--per-token=false, which is now true"),
        (["model.dtype=bfloat16"], ROWS, 'model.dtype="float32", which is now "bfloat16"'),
        ([], ROWS[:1], "other responses"),
    ],
)
def test_another_analysis_does_not_go_on_in_the_same_directory(
    tmp_path: Path, model: Path, more: list[str], rows: list[Any], says: str
):
    (tmp_path / "out").mkdir()
    take_up(read_analysis(parse(command(tmp_path, model, *given(tmp_path)))))
    layout = ["parallel.tp=2", "trainer.logprob_chunk_tokens=7"]
    take_up(read_analysis(parse(command(tmp_path, model, *given(tmp_path), *layout))))
    other = read_analysis(parse(command(tmp_path, model, *given(tmp_path), *more, rows=rows)))
    with pytest.raises(InputError, match="its analysis was begun with") as error:
        take_up(other)
    assert says in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn"])
def test_a_damaged_part_is_named(tmp_path: Path, model: Path, content: bytes):
    (tmp_path / "out" / "readings").mkdir(parents=True)
    analysis = read_analysis(parse(command(tmp_path, model, *given(tmp_path))))
    take_up(analysis)
    (tmp_path / "out" / "readings" / "000000.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"000000\.npz: cannot be read"):
        take_up(analysis)
