"""Data sets that the `datasets` library reads: hub ids, and directories of its files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError

FORMATS = (
    "a .jsonl, .json, .parquet or .csv file, a directory of a data set, or a hub id: NAME, "
    "ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG/SPLIT"
)
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<part>[^:]+))?")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves beside the data


def read_hub(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a hub id or of a directory; `:SPLIT` behind either, else the split `train`."""
    path, part = (source, None) if Path(source).is_dir() else _parted(source)
    hub_id = _HUB_ID.fullmatch(source)
    if not Path(path).is_dir():
        if hub_id is None or Path(source).exists():
            reason = "is neither a known kind of file nor a hub id"
            raise InputError(source, reason, f"name {FORMATS}")
        path, part = hub_id["name"], hub_id["part"]
    saved = any((Path(path) / name).is_file() for name in _SAVED)
    import datasets

    datasets.disable_progress_bars()
    try:
        yield from (("", row) for row in (_saved(path, part) if saved else _loaded(path, part)))
    except InputError:
        raise
    except Exception as error:  # of any library below
        reason = f"datasets cannot load it ({type(error).__name__}: {error})"
        way_out = f"name {FORMATS}"
        if not Path(path).is_dir():
            way_out += "; without network: a directory that datasets.save_to_disk wrote elsewhere"
        raise InputError(source, reason, way_out) from error


def _parted(source: str) -> tuple[str, str | None]:
    path, _, part = source.rpartition(":")
    return (path, part) if path else (source, None)


def _loaded(path: str, part: str | None) -> Any:
    import datasets

    config, _, split = (part or "train").rpartition("/")
    return datasets.load_dataset(path, config or None, split=split)


def _saved(path: str, part: str | None) -> Any:
    import datasets

    found = datasets.load_from_disk(path)
    if not isinstance(found, datasets.DatasetDict):
        if part is not None:
            raise InputError(f"{path}:{part}", "has no splits", f"name {path}")
        return found
    split = part or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if split not in found:
        reason = f"has the splits {', '.join(map(str, found))}"
        raise InputError(f"{path}:{split}", reason, f"name one, as {path}:{next(iter(found))}")
    return found[split]
