"""Data files as they come: damaged, in other encodings, by other programs, by mistake.

Each is a file's name, its content, and what must come of it: a part of the error that names it, or
the number of questions that are read.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet

GOOD: list[dict[str, Any]] = [{"prompt": f"Add {i} and 1.", "answer": str(i + 1)} for i in range(4)]
LINES = [json.dumps(row) for row in GOOD]
JSONL = ("\n".join(LINES) + "\n").encode()
CSV = b"prompt,answer\nOne?,1\nTwo?,2\n"
ROW_3 = "row 3 (line 3): "

Mutation = tuple[str, bytes, str | int]


def with_row(row: str | bytes | Any) -> bytes:
    """The good rows, and `row` (a line, or what becomes one) as the third."""
    line = row if isinstance(row, str | bytes) else json.dumps(row)
    content = line if isinstance(line, bytes) else line.encode()
    first, rest = "\n".join(LINES[:2]), "\n".join(LINES[2:])
    return first.encode() + b"\n" + content + b"\n" + rest.encode() + b"\n"


def _chat(*messages: Any, answer: Any = "1") -> dict[str, Any]:
    return {"prompt": list(messages), "answer": answer}


def _parquet(*rows: dict[str, Any], schema: pa.Schema | None = None) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    return sink.getvalue()


def _table(columns: dict[str, pa.Array] | list[pa.Array], names: list[str] | None = None) -> bytes:
    sink = io.BytesIO()
    table = pa.table(columns) if names is None else pa.Table.from_arrays(columns, names=names)
    parquet.write_table(table, sink)
    return sink.getvalue()


def jsonl_mutations() -> Iterator[Mutation]:
    user, system = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Add."}
    deep = '{"prompt": "1?", "answer": "1", "more": ' + "[" * 40 + "]" * 40 + "}"
    deeper = '{"prompt": ' + "[" * 9000 + "]" * 9000 + ', "answer": "1"}'
    lines: list[tuple[Any, str | int]] = [
        ('{"prompt": "cut', f"{ROW_3}is not JSON (Unterminated string"),
        ("{'prompt': 'Python'}", f"{ROW_3}is not JSON"),
        ("prompt: yaml", f"{ROW_3}is not JSON"),
        ("[1, 2]", f"{ROW_3}is a list, not an object"),
        ('"text"', f"{ROW_3}is a str, not an object"),
        ("null", f"{ROW_3}is a NoneType"),
        ("NaN", f"{ROW_3}is a float"),
        ("{}", f"{ROW_3}has no column 'prompt'"),
        (LINES[0] + LINES[1], f"{ROW_3}is not JSON (Extra data"),
        (b'{"prompt": "\xe9", "answer": "1"}', f"{ROW_3}is not UTF-8 text"),
        (b"\xef\xbb\xbf" + LINES[0].encode(), f"{ROW_3}is not JSON"),
        (b'{"prompt": "a\0b", "answer": "1"}', f"{ROW_3}is not JSON (Invalid control"),
        ({"prompt": "a\0b", "answer": "1"}, f"{ROW_3}column 'prompt' holds a NUL"),
        ('{"prompt": "1", "prompt": "2", "answer": "1"}', f"{ROW_3}is not usable JSON (the key"),
        (f'{{"prompt": "1?", "answer": {"9" * 5000}}}', f"{ROW_3}is not usable JSON"),
        ('{"prompt": "\\ud800?", "answer": "1"}', f"{ROW_3}column 'prompt' holds half"),
        ('{"prompt": "1?", "answer": "\\udc00"}', f"{ROW_3}column 'answer' holds half"),
        (deep, f"{ROW_3}is nested more than 32 levels deep"),
        (deeper, f"{ROW_3}is nested more than 32 levels deep"),
        ({"prompt": "  \n", "answer": "1"}, f"{ROW_3}column 'prompt' is empty"),
        ({"prompt": True, "answer": "1"}, f"{ROW_3}column 'prompt' is neither text nor"),
        ('{"prompt": NaN, "answer": "1"}', f"{ROW_3}column 'prompt' is neither text nor"),
        ({"prompt": {"text": "1?"}, "answer": "1"}, f"{ROW_3}column 'prompt' is neither text nor"),
        ({"prompt": None, "answer": "1"}, f"{ROW_3}has nothing in column 'prompt'"),
        (_chat(), f"{ROW_3}column 'prompt' is neither text nor"),
        (_chat("1+1?"), f"{ROW_3}column 'prompt' is neither text nor"),
        (_chat({"content": "1+1?"}), f"{ROW_3}column 'prompt' is neither text nor"),
        (_chat({"role": "user", "content": None}), f"{ROW_3}column 'prompt' is neither text nor"),
        (_chat({"role": "user", "content": [user]}), f"{ROW_3}column 'prompt' is neither text nor"),
        (_chat({"role": "user", "content": " "}), f"{ROW_3}column 'prompt' is empty"),
        (_chat(system), f"{ROW_3}column 'prompt' is a chat without a question"),
        (
            _chat(user, {"role": "assistant", "content": "2"}),
            f"{ROW_3}column 'prompt' is a chat that ends with the assistant",
        ),
        (
            {"prompt": json.dumps([user]), "answer": "1"},
            f"{ROW_3}column 'prompt' is a list of chat",
        ),
        ({"prompt": "1?", "answer": []}, f"{ROW_3}column 'answer' is a list of 0"),
        ({"prompt": "1?", "answer": ["1", "2"]}, f"{ROW_3}column 'answer' is a list of 2"),
        ({"prompt": "1?", "answer": ["1"]}, 5),
        ({"prompt": "1?", "answer": [["1"]]}, f"{ROW_3}column 'answer' is a list of 1"),
        ({"prompt": "1?", "answer": ""}, f"{ROW_3}column 'answer' is empty"),
        ({"prompt": "1?", "answer": {"a": 1, "b": 2}}, f"{ROW_3}column 'answer' holds several"),
        ('{"prompt": "1?", "answer": NaN}', f"{ROW_3}column 'answer' is nan"),
        ('{"prompt": "1?", "answer": 1e999}', f"{ROW_3}column 'answer' is inf"),
        ({"prompt": "1?", "answer": False}, 5),
        ({"prompt": "x" * 10**6, "answer": "1"}, 5),
        ({"Problem": "1?", "Answer": 1}, 5),
        ("  \t", 4),
        ("\r", 4),
    ]
    for number, (line, expected) in enumerate(lines):
        yield f"line{number}.jsonl", with_row(line), expected


def file_mutations() -> Iterator[Mutation]:
    yield "crlf.jsonl", JSONL.replace(b"\n", b"\r\n"), 4
    yield "no_end.jsonl", JSONL.rstrip(), 4
    yield "bom.jsonl", b"\xef\xbb\xbf" + JSONL, 4
    yield "mac.jsonl", JSONL.replace(b"\n", b"\r"), "row 1 (line 1): is not JSON (Extra data"
    yield "packed.jsonl", gzip.compress(JSONL), "is compressed by gzip"
    yield "utf16.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16 text"
    yield "utf16le.jsonl", JSONL.decode().encode("utf-16-le"), "row 1 (line 1): is not JSON"
    yield "parquet.jsonl", _parquet(*GOOD), "is a parquet file by another name"
    yield "empty.jsonl", b"", "has no rows"
    yield "list.jsonl", json.dumps(GOOD).encode(), "row 1 (line 1): is a list, not an object"
    yield "list.json", json.dumps(GOOD, indent=1).encode(), 4
    yield "lines.json", JSONL, 4
    yield "cut.json", json.dumps(GOOD).encode()[:-9], "is not JSON"
    yield "wrapped.json", json.dumps({"data": GOOD}).encode(), "row 1 (line 1): has no column"
    yield "mixed.json", json.dumps([*GOOD, 3]).encode(), "row 5: is a int, not an object"
    yield "twice.json", b'[{"prompt": "1", "prompt": "2"}]', "the key 'prompt' stands in it twice"


def csv_mutations() -> Iterator[Mutation]:
    yield "plain.csv", CSV, 2
    yield "crlf_bom.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n"), 2
    yield "blank.csv", CSV.replace(b"Two", b"\n\nTwo"), 2
    yield "spaces.csv", CSV.replace(b"prompt,answer", b"prompt, answer"), 2
    yield "lines.csv", b'prompt,answer\n"One\nor two, ""more""?",1\n', 1
    yield "open.csv", CSV + b'"Three?,3\n', "is not CSV (unexpected end of data)"
    yield "stray.csv", CSV + b'"Three"?,3\n', "line 4: is not CSV"
    yield "wide.csv", CSV + b"Three?,3,x\n", "row 3 (line 4): has 3 fields, and the header names 2"
    yield "narrow.csv", CSV + b"Three?\n", "row 3 (line 4): has 1 field, and the header names 2"
    yield "no_answer.csv", CSV + b"Three?,\n", "row 3 (line 4): column 'answer' is empty"
    yield "twins.csv", b"prompt,answer,answer\nOne?,1,2\n", "has two columns 'answer'"
    yield "no_header.csv", b"One?,1\nTwo?,2\n", "row 1 (line 2): has no column 'prompt'"
    yield "semicolons.csv", CSV.replace(b",", b";"), "row 1 (line 2): has no column 'prompt'"
    yield "latin.csv", CSV + b"Quatr\xe9?,4\n", "line 4: is not UTF-8 text"
    yield "nul.csv", CSV + b"Th\0ree?,3\n", "row 3 (line 4): column 'prompt' holds a NUL"
    yield "huge.csv", CSV + b"Three?," + b"3" * 200_000 + b"\n", 3
    yield "header.csv", b"prompt,answer\n", "has no rows"
    yield "empty.csv", b"", "has no rows"


def parquet_mutations() -> Iterator[Mutation]:
    good = _parquet(*GOOD)
    words, numbers = pa.array(["One?", "Two?"]), pa.array([1.0, 2.5])
    yield "good.parquet", good, 4
    yield "cut.parquet", good[:-20], "is not a readable parquet file"
    yield "half.parquet", good[: len(good) // 2], "is not a readable parquet file"
    yield "empty.parquet", b"", "is not a readable parquet file"
    yield "text.parquet", JSONL, "is not a readable parquet file"
    schema = pa.schema([("prompt", pa.string()), ("answer", pa.string())])
    yield "none.parquet", _parquet(schema=schema), "has no rows"
    twins = _table([words, numbers, numbers], ["prompt", "answer", "answer"])
    yield "twins.parquet", twins, "has two columns 'answer'"
    yield "nulls.parquet", _parquet(*GOOD, {"prompt": None, "answer": "1"}), "row 5: has nothing in"
    struct = {"prompt": "One?", "answer": {"value": "1", "unit": None}}
    yield "struct.parquet", _parquet(struct), "row 1: column 'answer' holds several fields"
    yield "lists.parquet", _parquet({"prompt": "1?", "answer": ["1", "2"]}), "is a list of 2"
    yield (
        "bytes.parquet",
        _parquet({"prompt": "1?", "answer": b"1"}),
        "is neither text nor a number",
    )
    yield "numbers.parquet", _table({"prompt": words, "answer": numbers}), 2
    nan = pa.array([1.0, float("nan")])
    yield "nan.parquet", _table({"prompt": words, "answer": nan}), "row 2: column 'answer' is nan"
    bad = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")],
    )
    wrong = _table({"prompt": bad, "answer": numbers})
    yield "bytes_as_text.parquet", wrong, "row 2: holds what Python cannot"
    chat = [{"role": "user", "content": "1+1?"}, {"role": None, "content": None}]
    yield "roles.parquet", _parquet(_chat(*chat)), "row 1: column 'prompt' is neither text nor"


MUTATIONS = [*jsonl_mutations(), *file_mutations(), *csv_mutations(), *parquet_mutations()]
