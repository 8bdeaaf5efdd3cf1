"""The values of config.json, each checked for what it should be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError

LARGEST = 2**31 - 1


def size(path: Path, raw: Mapping[str, Any], key: str, *, at_most: int = LARGEST) -> int:
    """The positive integer `raw[key]`."""
    value = raw[key]
    if type(value) is not int or value < 1:
        raise _wrong(path, key, value, "is not a positive integer")
    if value > at_most:
        raise _wrong(path, key, value, f"is more than {at_most}")
    return value


def number(path: Path, raw: Mapping[str, Any], key: str) -> float:
    """The positive number `raw[key]`."""
    value = raw.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= sys.float_info.max
    ):
        raise _wrong(path, key, value, "is not a positive number")
    return float(value)


def token_ids(
    path: Path, raw: Mapping[str, Any], key: str, vocab_size: int = LARGEST
) -> tuple[int, ...]:
    """The token id or the list of token ids `raw[key]`; none where that is null or absent."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise _wrong(path, key, value, f"is no token id in 0..{vocab_size - 1}")
    return tuple(ids)


def flag(path: Path, raw: Mapping[str, Any], key: str) -> bool:
    """The truth value `raw[key]`."""
    if not isinstance(raw[key], bool):
        raise _wrong(path, key, raw[key], "is not true or false")
    return raw[key]


def _wrong(path: Path, key: str, value: Any, reason: str) -> InputError:
    shown = str(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InputError(f"{path}: {key}={shown}", reason, f"restore {path.name}")
