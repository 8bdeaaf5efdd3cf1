from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_bupo.data.rows import Row, read_rows
from megatron_bupo.errors import InputError

ROWS = [
    {"prompt": "1+2=", "reward_model": {"ground_truth": "3", "style": "rule"}},
    {"prompt": [{"role": "user", "content": "é"}], "reward_model": {"ground_truth": "4"}},
]


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl_and_json_files_hold_the_same_rows(tmp_path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "bom.jsonl").write_bytes(
        b"\xef\xbb\xbf" + Path(jsonl(tmp_path / "a.jsonl", ROWS)).read_bytes()
    )
    jsonl(tmp_path / "lines.json", ROWS)
    for name in ("a.jsonl", "bom.jsonl", "list.json", "lines.json"):
        assert [row.values for row in read_rows(str(tmp_path / name))] == ROWS, name


def test_parquet_structs_and_csv_cells_become_plain_values(tmp_path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": "1+2="}], "reward_model": {"truth": "3"}}] * 3
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert [row.values for row in read_rows(f"{tmp_path}/a.parquet")] == rows
    (tmp_path / "a.csv").write_text('prompt,answer\n"1+\n2=",3\n4+4=,8\n')
    read = list(read_rows(f"{tmp_path}/a.csv"))
    assert [row.values for row in read] == [
        {"prompt": "1+\n2=", "answer": "3"},
        {"prompt": "4+4=", "answer": "8"},
    ]
    assert read[1].where.endswith("a.csv row 2 (line 4)")


def test_rows_and_lines_are_counted_from_one_and_blank_lines_are_no_rows(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}')
    first, second = read_rows(f"{tmp_path}/a.jsonl")
    assert (first.index, first.where) == (0, f"{tmp_path}/a.jsonl row 1 (line 2)")
    assert (second.index, second.where) == (1, f"{tmp_path}/a.jsonl row 2 (line 4)")


def test_a_dotted_path_looks_inside_structs_unless_a_column_has_that_very_name() -> None:
    row = Row(0, "", {"a": {"b": {"c": 1}}, "x.y": 2, "x": {"y": 3}, "s": "text"})
    assert [row.get(path) for path in ("a.b.c", "x.y", "s")] == [1, 2, "text"]
    for path in ("a.c", "s.c", "z", ""):
        with pytest.raises(KeyError):
            row.get(path)
    assert row.columns() == ["a.b.c", "x.y", "x.y", "s"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "none.jsonl: there is no such file"),
        ("no such data", None, "no such data: is neither a known kind of file nor a hub id"),
        ("notes.txt", "1+1", "notes.txt: is neither a known kind of file nor a hub id"),
        ("empty.jsonl", "", "empty.jsonl: has no rows"),
        ("blank.jsonl", "\n \n", "blank.jsonl: has no rows"),
        ("empty.json", "[]", "empty.json: has no rows"),
        ("empty.csv", "prompt,answer\n", "empty.csv: has no rows"),
        (
            "cut.jsonl",
            '{"a": 1}\n{"a": \n',
            "cut.jsonl row 2 (line 2): is not JSON (Expecting value",
        ),
        (
            "cut.json",
            '[{"a": 1},\n{"a" 2}]',
            "cut.json: is not JSON (Expecting ':' delimiter at line 2",
        ),
        ("list.jsonl", '{"a": 1}\n[1]\n', "list.jsonl row 2 (line 2): is a list, not an object"),
        ("list.json", '[{"a": 1}, 3]', "list.json row 2: is a int, not an object"),
        ("latin.jsonl", b'{"a": "\xe9"}', "latin.jsonl row 1 (line 1): is not UTF-8"),
        (
            "wide.csv",
            "a,b\n1,2\n1,2,3\n",
            "wide.csv row 2 (line 3): has 3 fields, and the header names 2",
        ),
        ("open.csv", 'a,b\n1,"2\n', "is not CSV"),
        ("false.parquet", "PAR2", "false.parquet: is not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_place(tmp_path, name, content, says) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = str(path) if path.suffix else name
    with pytest.raises(InputError) as caught:
        list(read_rows(source))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anything_else_is_read_by_datasets(tmp_path, monkeypatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for split, answer in (("train", "3"), ("test", "4")):
        (tmp_path / "org" / "name").mkdir(parents=True, exist_ok=True)
        jsonl(tmp_path / "org" / "name" / f"{split}.jsonl", [{"prompt": "?", "answer": answer}])
    assert [row.values["answer"] for row in read_rows("org/name")] == ["3"]
    assert [row.values["answer"] for row in read_rows("org/name:test")] == ["4"]
    with pytest.raises(InputError, match=r"org/name:dev: datasets cannot load it"):
        list(read_rows("org/name:dev"))


def test_reading_local_files_needs_neither_torch_nor_datasets(tmp_path) -> None:
    import subprocess

    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "1+2=", "answer": "3"}])
    check = (
        "import sys\nfrom megatron_bupo.config.schema import DataConfig\n"
        "from megatron_bupo.data.prompts import check_rows\n"
        f"check_rows(DataConfig(train={source!r}))\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", check]
    assert subprocess.check_output(command, text=True, cwd=root).strip() == "set()"
