"""A checkpoint that is compared with another: what it holds, by HF name, wherever it is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from megatron_bupo.convert_source import (
    METADATA,
    TRACKER,
    MegatronSource,
    find_base,
    find_source,
    read_its_architecture,
)
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import CheckpointIndex, expected_tensors, is_harmless, read_index
from megatron_bupo.hf.writer import DTYPES


@dataclass(frozen=True)
class Stored:
    """A tensor as it is kept: `dtype` in torch's words."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    path: Path
    files: Path  # the directory of its config.json and tokenizer
    architecture: Architecture
    tensors: Mapping[str, Stored]  # by HF name
    read: Callable[[str], Tensor]
    torch_dist: TorchDistSide | None = None  # None: an HF directory


@dataclass(frozen=True)
class TorchDistSide:
    """What Megatron-Core's own loader must know of a checkpoint."""

    path: Path
    stacked: bool  # all layers in one tensor, as Megatron-LM saves them
    whole: bool  # no layers are missing, which would be taken from elsewhere


def is_megatron(path: Path) -> bool:
    """Is a Megatron checkpoint what `path` means, rather than an HF directory?"""
    return any((path / name).exists() for name in (METADATA, TRACKER, "checkpoints"))


def open_megatron(path: Path, stack: ExitStack, like: Path | None = None) -> Side:
    """The torch_dist checkpoint that `path` means; `like` is an HF directory with its side files,
    needed where it has none of its own.
    """
    from megatron_bupo.mcore.hf_weights import Row, Unit, unit_rows, units
    from megatron_bupo.mcore.torch_dist_reader import TorchDist
    from megatron_bupo.mcore.torch_dist_units import (
        absent_units,
        check_padding,
        locate,
        read_row,
    )

    source = _source(str(path), like)
    arch = read_its_architecture(source)
    checkpoint = TorchDist(source.path)
    located = locate(checkpoint, arch)
    check_padding(checkpoint, located, arch)
    absent = absent_units(located, arch)
    base = find_base(source, arch, arch.layers - len(absent)) if absent else None
    read_base = None if base is None else hf_reader(base, stack)
    rows = {
        name: (unit, row)
        for unit in units(arch)
        for row in unit_rows(unit, arch, ep=1)
        for name in row.hf
    }

    @lru_cache(maxsize=1)  # the tensors of a parameter are asked for one after the other
    def of_parameter(unit: Unit, row: Row) -> dict[str, Tensor]:
        return read_row(row, located[unit][row.hf[0]], checkpoint, arch)

    def read(name: str) -> Tensor:
        unit, row = rows[name]
        if unit in located:
            return of_parameter(unit, row)[name]
        assert read_base is not None, "what the checkpoint has not is in the base"
        return read_base(name)

    def stored(name: str, shape: tuple[int, ...]) -> Stored:
        unit, row = rows[name]
        if base is not None and unit not in located:
            return Stored(DTYPES[base.tensors[name].dtype], shape)
        dtype = checkpoint.dtype(located[unit][row.hf[0]].key)
        return Stored(str(dtype).removeprefix("torch."), shape)

    tensors = {name: stored(name, shape) for name, shape in expected_tensors(arch).items()}
    stacked = any(re.match(r"decoder\.layers\.\D", key) for key in checkpoint.keys)
    theirs = TorchDistSide(source.path, stacked, whole=not absent)
    return Side(path, source.like, arch, tensors, read, theirs)


def _source(path: str, like: Path | None) -> MegatronSource:
    """The checkpoint with its own side files, else with those of `like`."""
    try:
        return find_source(path, None)
    except InputError:
        if like is None:
            raise
        return find_source(path, str(like))


def open_hf(path: Path, stack: ExitStack) -> Side:
    """The HF directory `path`; its files stay open until `stack` closes."""
    architecture, index = read_architecture(path), read_index(path)
    tensors = {
        name: Stored(DTYPES.get(found.dtype, found.dtype), found.shape)
        for name, found in index.tensors.items()
        if not is_harmless(name, architecture)
    }
    return Side(path, path, architecture, tensors, hf_reader(index, stack))


def hf_reader(index: CheckpointIndex, stack: ExitStack) -> Callable[[str], Tensor]:
    """`read(hf_name)` -> that tensor; files are open until `stack` closes."""
    open_slice = slice_opener(index, stack)
    return lambda name: open_slice(name)[...]
