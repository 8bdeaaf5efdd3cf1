"""The data tool on small files in the layouts of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.questions import BOXED, read_question
from megatron_bupo.data.rows import read_rows
from tools import known_data, prepare_data
from tools.prepare_data import main

DAPO = (  # what the hub's file has around a question, typed a second time
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is {i}+1?\n\nRemember to put your answer on its own line after "Answer:".'
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepmath-103k": {"question": "q{i}", "final_answer": "a{i}", "difficulty": 5.5, "topic": "t"},
    "math500": {"problem": "q{i}", "solution": "s", "answer": "a{i}", "level": 4, "unique_id": "u"},
    "aime24": {"ID": "2024-I-1", "Problem": "q{i}", "Solution": "s", "Answer": 33},
    "aime25": {"problem": "q{i}", "answer": "033", "id": "0"},
    "amc23": {"id": 0, "question": "q{i}", "answer": 33.0, "url": "u"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def layout(name: str, count: int) -> list[dict[str, Any]]:
    row = LAYOUTS[name]
    fill = {k: v for k, v in row.items() if isinstance(v, str)}
    return [row | {k: v.replace("{i}", str(i)) for k, v in fill.items()} for i in range(count)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_becomes_the_same_columns_which_training_reads(name, tmp_path, capsys) -> None:
    source, out = write(tmp_path / "hub.parquet", layout(name, 30)), tmp_path / "out"
    assert main([name, "--source", source, "--out", str(out), "--rows", "30"]) == 0
    rows = list(read_rows(f"{out}/{name}.parquet"))
    for i, row in enumerate(rows):
        assert row.values == {
            "prompt": [{"role": "system", "content": BOXED}, {"role": "user", "content": f"q{i}"}],
            "question": f"q{i}",
            "answer": f"a{i}" if name in {"deepmath-103k", "math500"} else "33",
            "source": name,
            "index": i,
            "difficulty": {"deepmath-103k": 5.5, "math500": 4.0}.get(name),
        }
        assert read_question(row, DataConfig()).prompt == row.values["prompt"]
    assert "30 rows of 30" in capsys.readouterr().out


def test_the_repeats_of_dapo_are_one_question_each_without_the_instruction(tmp_path) -> None:
    def row(i: int, answer: str) -> dict[str, Any]:
        prompt = [{"content": DAPO.replace("{i}", str(i)), "role": "user"}]
        return {"prompt": prompt, "reward_model": {"ground_truth": answer, "style": "rule"}}

    rows = [row(i, str(i + 1)) for i in range(4)] * 3 + [row(2, "another")]
    source, out = write(tmp_path / "hub.parquet", rows), tmp_path / "out"
    assert main(["dapo-17k", "--source", source, "--out", str(out)]) == 2  # 13 rows are too few
    assert not list(out.iterdir())
    assert main(["dapo-17k", "--source", source, "--out", str(out), "--rows", "4"]) == 0
    read = [row.values for row in read_rows(f"{out}/dapo-17k.parquet")]
    assert [(r["question"], r["answer"], r["index"]) for r in read] == [
        (f"What is {i}+1?", str(i + 1), i) for i in range(4)
    ]
    manifest = json.loads((out / "dapo-17k.json").read_text())
    assert (manifest["source_rows"], manifest["rows"]) == (13, 4)
    assert manifest["dropped"]["repeats"] == 9
    assert manifest["dropped"]["repeats_with_another_answer"] == 1


def test_five_thousand_are_drawn_by_difficulty_and_the_same_from_any_order(tmp_path) -> None:
    histogram = known_data.FIVE_THOUSAND
    assert sum(histogram.values()) == 5000
    levels = [level for level, count in histogram.items() for _ in range(count + 2)]
    rows = [
        {"question": f"What is {i}?", "final_answer": str(i), "difficulty": level}
        for i, level in enumerate(levels)
    ]
    contents = []
    for order in (rows, rows[::-1]):
        out = tmp_path / str(len(contents))
        source = write(tmp_path / "hub.parquet", order)
        assert main(["deepmath-5k", "--source", source, "--out", str(out)]) == 0
        drawn = [row.values["difficulty"] for row in read_rows(f"{out}/deepmath-5k.parquet")]
        assert {level: drawn.count(level) for level in histogram} == histogram
        manifest = json.loads((out / "deepmath-5k.json").read_text())
        assert manifest["content_is_the_authors"] is False
        assert manifest["dropped"]["not_drawn"] == 2 * len(histogram)
        contents.append(manifest["content"])
    assert contents[0] == contents[1]
    few = write(tmp_path / "few.parquet", rows[:100])
    assert main(["deepmath-5k", "--source", few, "--out", str(tmp_path)]) == 2


def test_verify_tells_what_has_changed_and_overlap_is_counted(tmp_path, capsys) -> None:
    train, out = layout("deepmath-103k", 40), tmp_path / "out"
    train[7]["question"] = train[9]["question"] = " Q3\n"
    for name, rows in {"deepmath-103k": train, "amc23": layout("amc23", 40)}.items():
        for row in rows[20:]:
            row["question"] = f"{name} {row['question']}"
        source = write(tmp_path / f"{name}.parquet", rows)
        assert main([name, "--source", source, "--out", str(out), "--rows", "40"]) == 0
    assert "deepmath-103k asks 18 of the 40 questions of amc23" in capsys.readouterr().out
    found = json.loads((out / "overlap.json").read_text())["deepmath-103k"]["amc23"]
    assert [7, 3] in found["rows"]
    assert main(["--verify", str(out)]) == 0
    content = (out / "amc23.parquet").read_bytes()
    (out / "amc23.parquet").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["--verify", str(out)]) == 1
    items = [*prepare_data._items_of(out / "deepmath-103k.parquet")]
    assert prepare_data.content_of(items) == prepare_data.content_of(items[::-1])
    assert prepare_data.content_of(items) != prepare_data.content_of(items[1:])
    (out / "amc23.parquet").unlink()
    assert main(["--verify", str(out)]) == 1
    told = capsys.readouterr().out
    assert "amc23: amc23.parquet is missing" in told
    assert "overlap.json: is not that of these files" in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["math501", "--out", "out"], "NAME=math501: is not known; choose from deepmath-103k, "),
        (["--out", "out"], "NAME and --out: are both needed"),
        (["math500", "amc23", "--out", "out", "--source", "x"], "are of one data set"),
        (["math500", "--out", "out", "--source", "none.parquet"], "none.parquet: there is no such"),
        (["math500", "--out", "few.jsonl", "--source", "few.jsonl"], "is not a directory"),
        (["math500", "--out", "out", "--source", "few.jsonl"], "gives 1 rows of math500, not 500"),
        (
            ["amc23", "--out", "out", "--source", "bad.jsonl"],
            "bad.jsonl row 1 (line 1): has no col",
        ),
        (["--verify", "."], "--verify .: holds no prepared data set"),
    ],
)
def test_what_cannot_be_prepared_is_refused_by_name(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("few.jsonl").write_text('{"problem": "1?", "answer": "1"}\n')
    Path("bad.jsonl").write_text('{"problem": "1?"}\n')
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_the_authors_files_are_known_by_their_checksums(tmp_path) -> None:
    folder = Path(__file__).parents[1] / "data"
    files = {"deepmath-5k": "deepmath-5k", "math500": "math500", "aime24": "aime_2024"}
    there = {name: folder / f"{file}.parquet" for name, file in files.items()}
    if not all(path.is_file() for path in there.values()):
        pytest.skip(f"not all of {', '.join(files.values())} are in {folder}")
    for name, path in there.items():
        assert main([name, "--source", str(path), "--out", str(tmp_path)]) == 0
        manifest = json.loads((tmp_path / f"{name}.json").read_text())
        assert manifest["source_is_the_authors_file"]
        assert manifest["content_is_the_authors"]
    overlap = json.loads((tmp_path / "overlap.json").read_text())
    assert {found["asked"] for found in overlap["deepmath-5k"].values()} == {0}
