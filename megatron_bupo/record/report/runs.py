"""What does a run directory say? Its metrics, settings and guard, read as tolerantly as can be: the
run may still be going, may have been killed in the middle of a line, or may be of an older version.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bupo.durable import whole_lines
from megatron_bupo.errors import InputError
from megatron_bupo.record.metrics import FILE, internal_layer
from megatron_bupo.record.summary import GUARD

CONFIG = "config.yaml"

LARGEST = 1e60  # number that an axis can have beside others

Record = dict[str, Any]  # as `read_metrics` has them: step, policy, and numbers


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it."""

    name: str
    path: Path
    records: tuple[Record, ...] = ()  # in order of step, each step once
    settings: Mapping[str, Any] | None = None  # dotted key -> value; None: not known
    guard: Mapping[str, Any] | None = None  # how it left the internal phase, if it did


def read_runs(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[RunRecord]:
    """The runs in the directories `paths`, each once, called `names` or by what tells their paths
    apart.
    """
    if names is not None:
        _check_names(names, len(paths))
    named: dict[Path, str | None] = {}
    for path, name in zip(paths, names or [None] * len(paths), strict=True):
        named.setdefault(path.resolve(), name)
    runs = [
        _read_run(path, name or short)
        for (path, name), short in zip(named.items(), _short_names(list(named)), strict=True)
    ]
    if not any(run.records for run in runs):
        where = str(runs[0].path / FILE) if len(runs) == 1 else f"the metrics of {len(runs)} runs"
        raise InputError(where, "no step has finished, so there is nothing to show", "train first")
    return runs


def _check_names(names: Sequence[str], count: int) -> None:
    where = f"--names {','.join(names)}"
    if len(names) != count:
        reason = f"{len(names)} names for {count} directories"
        raise InputError(where, reason, "give one for each, with commas between")
    if not all(names) or len(set(names)) != len(names):
        raise InputError(where, "would not tell the runs apart", "give each a name of its own")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    names, parts = [path.name for path in paths], 1
    while len(set(names)) < len(names):  # whole paths are not alike
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return [os.fsencode(name).decode(errors="replace") for name in names]


def _read_run(path: Path, name: str) -> RunRecord:
    if not any((path / file).is_file() for file in (FILE, CONFIG)):
        raise _no_run(path)
    settings = _read(path / CONFIG, yaml.safe_load, yaml.YAMLError)
    return RunRecord(
        name,
        path,
        tuple(_records(path / FILE)),
        None if settings is None else dict(_leaves(settings)),
        _read(path / GUARD, json.loads, ValueError),
    )


def _no_run(path: Path) -> InputError:
    if not path.exists():
        return InputError(str(path), "does not exist", "name a run_dir")
    if not path.is_dir():
        return InputError(str(path), "is no directory", "name a run_dir")
    inside = sorted(file.parent.name for file in path.glob(f"*/{FILE}"))
    way_out = "name the run_dir of a training run"
    if inside:
        more = ", ..." if len(inside) > 3 else ""
        way_out = f"it holds runs: name {', '.join(str(path / name) for name in inside[:3])}{more}"
    return InputError(str(path), f"is no run: it has neither {FILE} nor {CONFIG}", way_out)


def _read(path: Path, parse: Any, error: type[Exception]) -> dict[str, Any] | None:
    """The mapping in `path`; None where there is none, or not yet a whole one."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, error):
        return None
    return found if isinstance(found, dict) else None


def _leaves(settings: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _records(path: Path) -> list[Record]:
    """The lines of `path` by step; of a step that stands twice, the later line."""
    found: dict[int, Record] = {}
    try:
        lines = whole_lines(path)
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "look at it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, policy = record["step"], record["policy"]
            if type(step) is not int or step < 0:
                raise ValueError
            internal_layer({"policy": policy})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            where, reason = f"{path}, line {number}", "is not what a run writes of a step"
            raise InputError(where, reason, "remove the line, or restore the file") from None
        numbers = {key: _number(value) for key, value in record.items() if "/" in key}
        known = {key: value for key, value in numbers.items() if value is not None}
        found[step] = {"step": step, "policy": policy, **known}
    return [found[step] for step in sorted(found)]


def _number(value: object) -> float | None:
    """NaN for what was not finite, or too large to be drawn; None: no number at all."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        return None
    if not abs(value) < LARGEST:
        return math.nan
    return float(value) if abs(value) > 1 / LARGEST else 0.0
