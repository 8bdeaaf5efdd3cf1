"""The values of config.json, each checked for what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError


def size(path: Path, raw: Mapping[str, Any], key: str) -> int:
    """The positive integer `raw[key]`."""
    value = raw[key]
    if type(value) is not int or value < 1:
        raise InputError(
            f"{path}: {key}={value}", "is not a positive integer", "restore config.json"
        )
    return value


def number(path: Path, raw: Mapping[str, Any], key: str) -> float:
    """The positive number `raw[key]`."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(
            f"{path}: {key}={value}", "is not a positive number", "restore config.json"
        )
    return float(value)


def flag(path: Path, raw: Mapping[str, Any], key: str) -> bool:
    """The truth value `raw[key]`."""
    if not isinstance(raw[key], bool):
        raise InputError(f"{path}: {key}={raw[key]}", "is not true or false", "restore config.json")
    return raw[key]
