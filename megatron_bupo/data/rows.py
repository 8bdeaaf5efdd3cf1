"""Rows of a data file or hub data set, each with the place that an error message can point to.

Local files are read here (`formats.py`) and not through `datasets`: that keeps line numbers, does
not make the rows of a JSONL file agree on one schema, and leaves no cache behind. Hub ids and
directories go through `datasets` (`hub.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.config import expand
from megatron_bupo.data import formats
from megatron_bupo.data.formats import Fault
from megatron_bupo.data.hub import FORMATS, read_hub
from megatron_bupo.errors import InputError

_DEEPEST_COLUMN = 4  # dots in a path that an error message would suggest


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

    def has(self, path: str) -> bool:
        """Is there a value that `get` gives for `path`?"""
        try:
            self.get(path)
        except KeyError:
            return False
        return True

    def columns(self) -> list[str]:
        """What `get` can be asked for, as `column` or `column.field`."""
        return list(_paths(self.values))


def read_rows(source: str, *, key: str = "") -> Iterator[Row]:
    """The rows of `source`, one at a time; InputError where it is missing, malformed or empty.

    `key`: where the config names the source, for the message.
    """
    for row in scan_rows(source, key=key):
        if isinstance(row, InputError):
            raise row
        yield row


def scan_rows(source: str, *, key: str = "") -> Iterator[Row | InputError]:
    """As `read_rows`; a malformed row comes as the error that names it, and counts as a row."""
    named, source = f"{key}={source}" if key else source, expand(source)
    read = _READERS.get(Path(source).suffix.lower(), read_hub)
    if Path(source).is_dir():
        read = read_hub
    elif read is not read_hub and not Path(source).is_file():
        raise InputError(named, "there is no such file", f"name {FORMATS}")
    index = -1
    for index, (place, values) in enumerate(read(source)):
        where = f"{source} row {index + 1}{place}"
        if isinstance(values, Fault):
            yield InputError(where, values.reason, "mend the row")
        elif not isinstance(values, Mapping):
            reason = f"is a {type(values).__name__}, not an object with columns"
            yield InputError(where, reason, "mend the row")
        else:
            yield Row(index, where, values)
    if index < 0:
        raise InputError(named, "has no rows", "give a file with a prompt and an answer per row")


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix.count(".") < _DEEPEST_COLUMN:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": formats.read_jsonl,
    ".json": formats.read_json,
    ".csv": formats.read_csv,
    ".parquet": formats.read_parquet,
}
