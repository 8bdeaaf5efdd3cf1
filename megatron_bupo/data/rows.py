"""Rows of a data file or hub data set, each with the place that an error message can point to.

Local files are read here and not through `datasets`: that keeps line numbers, does not make the
rows of a JSONL file agree on one schema, and leaves no cache behind. Hub ids go through `datasets`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>.+))?")
_FORMATS = "a .jsonl, .json, .parquet or .csv file, or a hub id: NAME, ORG/NAME or ORG/NAME:SPLIT"


@dataclass(frozen=True)
class Row:
    """One data row. `where` counts rows and lines from 1, `index` counts rows from 0."""

    index: int
    where: str  # "train.jsonl row 17 (line 18)"
    values: Mapping[str, Any]

    def get(self, path: str) -> Any:
        """The value of a column, or of `column.field.field`; KeyError where there is none."""
        if path in self.values:
            return self.values[path]
        value: Any = self.values
        for key in path.split("."):
            if not isinstance(value, Mapping):
                raise KeyError(path)
            value = value[key]
        return value

    def columns(self) -> list[str]:
        """What `get` can be asked for, as `column` or `column.field`."""
        return list(_paths(self.values))


def read_rows(source: str, *, key: str = "") -> Iterator[Row]:
    """The rows of `source`, one at a time; InputError where it is missing, malformed or empty.

    `key`: where the config names the source, for the message.
    """
    named, source = f"{key}={source}" if key else source, expand(source)
    read = _READERS.get(Path(source).suffix.lower(), _read_hub)
    if read is not _read_hub and not Path(source).is_file():
        raise InputError(named, "there is no such file", f"name {_FORMATS}")
    index = -1
    for index, (place, values) in enumerate(read(source)):
        where = f"{source} row {index + 1}{place}"
        if not isinstance(values, Mapping):
            raise InputError(where, f"is a {type(values).__name__}, not an object with columns")
        yield Row(index, where, values)
    if index < 0:
        raise InputError(named, "has no rows", "give a file with a prompt and an answer per row")


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _read_jsonl(source: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(source).split("\n"), start=1):
        if line.strip():
            yield f" (line {number})", _parse_json(source, line, first_line=number)


def _read_json(source: str) -> Iterator[tuple[str, Any]]:
    text = _text(source)
    if not text.lstrip().startswith("["):  # JSONL by another name
        yield from _read_jsonl(source)
        return
    for values in _parse_json(source, text, first_line=1):
        yield "", values


def _text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(source, f"is not UTF-8 text ({error})") from None


def _parse_json(source: str, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        reason = f"is not JSON ({error.msg} at column {error.colno})"
        raise InputError(
            f"{source} line {line}", reason, "write one JSON object per line"
        ) from None


def _read_csv(source: str) -> Iterator[tuple[str, Any]]:
    with Path(source).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values:
                    reason = f"has more fields than the header's {len(values) - 1}"
                    raise InputError(f"{source} line {reader.line_num}", reason)
                yield f" (line {reader.line_num})", values
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{source} line {reader.line_num + 1}"
            raise InputError(where, f"is not CSV ({error})") from None


def _read_parquet(source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    yield "", values
    except pa.ArrowException as error:
        raise InputError(source, f"is not a readable parquet file ({error})") from None


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or Path(source).is_file():
        raise InputError(source, "is neither a known kind of file nor a hub id", f"name {_FORMATS}")
    from datasets import load_dataset

    try:
        dataset = load_dataset(hub_id["name"], split=hub_id["split"] or "train")
    except Exception as error:
        reason = f"datasets cannot load it ({type(error).__name__}: {error})"
        raise InputError(source, reason, f"name {_FORMATS}") from error
    for values in dataset:
        yield "", values


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
