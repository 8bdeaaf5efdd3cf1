"""What does a safetensors file say that it holds, and is that there? Read without torch.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype,
shape, data_offsets}}` and the data, in which tensors lie end to end and nothing else does. Here a
file either keeps to that to the byte or is refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError

HEADER_BYTES = 100_000_000  # no reader takes a longer one
Shape = tuple[int, ...]

BITS = {  # of an element of each dtype, as safetensors names them
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: its file, dtype (as safetensors names it, e.g. BF16) and shape."""

    file: Path
    dtype: str
    shape: Shape
    begin: int  # in the file, bytes
    bytes: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors that the header of the safetensors file `path` lists, all data present."""
    header, begin, data_bytes = _header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            first, end = entry["data_offsets"]
            numbers = (*shape, first, end - first)
            if not (isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)):
                raise TypeError
        except (LookupError, TypeError, ValueError):
            raise _no_safetensors(path, f"its header describes {name} as {entry}") from None
        tensors[name] = StoredTensor(path, dtype, shape, begin + first, end - first)
        if end > data_bytes:
            reason = f"is truncated: the last {end - data_bytes} bytes of {name} are missing"
            raise InputError(str(path), reason, "download it again")
        if dtype in BITS and prod(shape) * BITS[dtype] != 8 * (end - first):
            reason = f"its header gives {name} {end - first} bytes, but {dtype}{list(shape)} has "
            raise _no_safetensors(path, f"{reason}{prod(shape) * BITS[dtype] // 8}")
    _check_that_nothing_overlaps(path, tensors, begin, begin + data_bytes)
    return tensors


def _check_that_nothing_overlaps(
    path: Path, tensors: Mapping[str, StoredTensor], begin: int, end: int
) -> None:
    """The data is the tensors, end to end."""
    in_order = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].bytes))
    spans = [(name, tensor.begin, tensor.begin + tensor.bytes) for name, tensor in in_order]
    for (before, _, stop), (name, start, _) in pairwise([("its header", 0, begin), *spans]):
        if start != stop:
            how = "overlaps" if start < stop else "leaves a gap after"
            raise _no_safetensors(path, f"{name} {how} {before}")
    if (last := spans[-1][2] if spans else begin) != end:
        raise _no_safetensors(path, f"{end - last} bytes behind its tensors belong to none")


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where the data begins, and the bytes of data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                reason = f"is truncated or not a safetensors file: {size} bytes do not hold its "
                raise InputError(str(path), f"{reason}header", "download it again")
            text = file.read(length) if length <= HEADER_BYTES else b""
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "restore it") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
    except _RepeatedNameError as error:
        raise _no_safetensors(path, f"its header names {error} twice") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _no_safetensors(path, "its header is not a JSON object")
    return header, 8 + length, size - 8 - length


class _RepeatedNameError(Exception):
    """One name twice in a JSON object: readers differ in which one counts."""


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise _RepeatedNameError(repeated[0])
    return dict(pairs)


def _no_safetensors(path: Path, reason: str) -> InputError:
    return InputError(str(path), f"is not a safetensors file: {reason}", "download it again")
