"""Files of rows: what stands in them, row by row, and what is wrong with a row or the whole file.

A fault of one row is yielded in its place, so that a reader can tell of all of them; a fault of the
file (not text, cut off, no such header) is raised.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_bupo.errors import InputError

DEEPEST = 32  # levels of lists and objects in a row; beyond a thousand, Python itself gives up

# How files begin that are no text, whatever they are called
_BEGINNINGS = {
    b"\x1f\x8b": "is compressed by gzip",
    b"PK\x03\x04": "is a zip archive",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd",
    b"BZh": "is compressed by bzip2",
    b"PAR1": "is a parquet file by another name",
    b"\xff\xfe": "is UTF-16 text, not UTF-8",
    b"\xfe\xff": "is UTF-16 text, not UTF-8",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row."""

    reason: str


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """`( (line N)`, value) of every line that is not blank; as all readers here."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f" (line {number})", _json(line.rstrip(b"\r\n"))


def read_json(path: str) -> Iterator[tuple[str, Any]]:
    """A list of rows, or JSONL by another name."""
    content = _bytes(path)
    if not content.lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    rows = _json(content)
    if isinstance(rows, Fault):
        raise InputError(path, rows.reason, "write a list of objects, or an object per line")
    for values in rows:
        yield "", _shallow(values)


def read_csv(path: str) -> Iterator[tuple[str, Any]]:
    """The first line names the columns; cells are text."""
    try:
        text = _bytes(path).decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}", f"is not UTF-8 text ({error})") from None
    csv.field_size_limit(sys.maxsize)  # solutions are long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _refuse_twins(path, header)
        for cells in reader:
            if not cells:
                continue
            place = f" (line {reader.line_num})"
            if len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            else:
                counted = f"{len(cells)} field{'s' * (len(cells) != 1)}"
                yield place, Fault(f"has {counted}, and the header names {len(header)}")
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}", f"is not CSV ({error})") from None


def read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    """Structs become mappings."""
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _refuse_twins(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                for values in _as_python(batch):
                    yield "", values
    except InputError:
        raise
    except Exception as error:  # Arrow raises its own, OSError, ValueError, ...
        raise InputError(path, f"is not a readable parquet file ({error})") from None


def _as_python(batch: Any) -> Iterator[Any]:
    """The rows of a record batch; one that is no Python value does not take the others along."""
    try:
        yield from batch.to_pylist()
    except ValueError:  # e.g. text that is not UTF-8, a struct with two fields of one name
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except ValueError as error:
                yield Fault(f"holds what Python cannot ({error})")


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file behind its byte order mark; refused where it is no text at all."""
    try:
        with Path(path).open("rb") as file:
            beginning = file.read(4)
            for other, is_what in _BEGINNINGS.items():
                if beginning.startswith(other):
                    way_out = "unpack it, or give it the name and encoding that it has"
                    raise InputError(path, is_what, way_out)
            file.seek(3 if beginning.startswith(b"\xef\xbb\xbf") else 0)
            yield file
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None


def _bytes(path: str) -> bytes:
    with _opened(path) as file:
        return file.read()


def _json(text: bytes) -> Any:
    try:
        return _shallow(json.loads(text.decode(), object_pairs_hook=_object))
    except UnicodeDecodeError as error:
        return Fault(f"is not UTF-8 text ({error})")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return Fault(f"is not JSON ({error.msg} at {line}column {error.colno})")
    except ValueError as error:  # a key that stands twice, an integer of thousands of digits
        return Fault(f"is not usable JSON ({error})")
    except RecursionError:
        return Fault(f"is nested more than {DEEPEST} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {_twin([key for key, _ in pairs])!r} stands in it twice")
    return values


def _shallow(value: Any) -> Any:
    """`value`, if it is of a depth that can be printed, sent and written again."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        if depth > DEEPEST + 2:  # a list of rows is one level, and so is a row
            return Fault(f"is nested more than {DEEPEST} levels deep")
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return value


def _refuse_twins(path: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise InputError(path, f"has two columns {_twin(names)!r}", "rename or drop one")


def _twin(names: Sequence[str]) -> str:
    return Counter(names).most_common(1)[0][0]
