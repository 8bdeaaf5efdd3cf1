"""A data file is read right or refused by name, whatever stands in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.prompts import check_rows
from megatron_bupo.data.sources import training_parts
from megatron_bupo.errors import InputError
from tests.data.mutations import CSV, JSONL, MUTATIONS, jsonl_mutations


@pytest.mark.parametrize(
    ("name", "content", "expected"), MUTATIONS, ids=[name for name, *_ in MUTATIONS]
)
def test_a_damaged_file_is_refused_by_name_or_read_right(tmp_path, name, content, expected) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    data = DataConfig(train=str(path))
    if isinstance(expected, int):
        [part], notes = training_parts(data, [])
        assert len(part.questions) == part.rows == expected
        assert notes == []
        return
    with pytest.raises(InputError) as caught:
        check_rows(data)
    message = str(caught.value)
    assert str(path) in message
    assert expected in message
    assert len(message) < 1000
    assert "\n" not in message


@pytest.mark.parametrize("expected", ["refused", "skipped"])
def test_all_bad_lines_of_a_file_are_told_in_one_message(tmp_path, expected) -> None:
    """Every bad line of the table in one file, between good ones."""
    bad = [
        (content.split(b"\n")[2], expected)
        for _, content, expected in jsonl_mutations()
        if isinstance(expected, str)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(JSONL.split(b"\n")[0] + b"\n" + line for line, _ in bad))
    if expected == "refused":
        with pytest.raises(InputError) as caught:
            check_rows(DataConfig(train=str(path)))
        [told] = [str(caught.value)]
        assert told.startswith(f"{len(bad)} of {2 * len(bad)} rows are bad: ")
    else:
        [told] = check_rows(DataConfig(train=str(path), bad_rows="skip"))
        assert f"{len(bad)} of {2 * len(bad)} rows are bad and left out: " in told
    for number, (_, says) in enumerate(bad[:10]):
        row = 2 * number + 2
        assert f"{path} row {row} (line {row}): {says.partition(': ')[2]}" in told
    assert f"and {len(bad) - 10} more" in told
    assert "\n" not in told


def test_no_damage_to_a_byte_is_a_traceback(tmp_path) -> None:
    dice, outcomes = random.Random(0), {"read": 0, "refused": 0}
    parquet = next(content for name, content, _ in MUTATIONS if name == "good.parquet")
    listed = json.dumps([json.loads(line) for line in JSONL.splitlines()]).encode()
    whole = {"jsonl": JSONL, "json": listed, "csv": CSV, "parquet": parquet}
    for number in range(400):
        kind = list(whole)[number % 4]
        content = bytearray(whole[kind])
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(content))
            content[at : at + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(content)
        try:
            check_rows(DataConfig(train=str(path)))
        except InputError as refused:
            error = str(refused)
        else:
            error = None
        assert error is None or str(path) in error
        outcomes["refused" if error else "read"] += 1
    assert min(outcomes.values()) > 10


def test_what_is_no_file_is_refused_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "secret.jsonl").write_bytes(JSONL)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("folder.jsonl", "loop.jsonl", "absent.csv", "notes.txt", "a:b:c", "/", ".", "~no"):
        with pytest.raises(InputError) as caught:
            check_rows(DataConfig(train=name))
        assert Path(name).name in str(caught.value)
