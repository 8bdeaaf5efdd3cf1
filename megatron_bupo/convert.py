"""HF checkpoints to torch_dist and back, in one process, a tensor at a time.

Neither a model nor a process group is built: both directions are `mcore.hf_weights`' table read
against files. What is read is written before the next thing is read, so memory does not grow with
the model; what is written stays written if the process is killed. Numbers are moved, not computed:
without `--dtype` every bit stays.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.checkpoints import SIDE
from megatron_bupo.config.layout import Layout
from megatron_bupo.durable import partial_path, sync
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.headers import BITS
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import CheckpointIndex, expected_tensors
from megatron_bupo.hf.writer import (
    DTYPES,
    SHARD_BYTES,
    ShardPlan,
    ShardWriter,
    copy_side_files,
)
from megatron_bupo.mcore.hf_weights import Row, Unit, read_piece, unit_rows, units
from megatron_bupo.mcore.torch_dist import Entry, Holders, finish, write_unit
from megatron_bupo.mcore.torch_dist_reader import TorchDist
from megatron_bupo.mcore.torch_dist_units import Source, read_row
from megatron_bupo.record.transfer import Transfer, in_bytes
from megatron_bupo.resumable import Unfinished, existing_ancestor, unfinished

FORMAT = 1  # of what a killed conversion leaves; another one's is not gone on with
ENTRY_BYTES = 4096  # at most, of one tensor beside its data


@dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """An HF checkpoint that was looked at, and the torch_dist directory to make of it."""

    arch: Architecture
    index: CheckpointIndex
    out: Path
    layout: Layout
    stages: dict[int, int]  # layer, counted from 1 -> its pipeline stage
    dtype: str  # of what is written, as safetensors names it
    named_dtype: str | None  # for config.json; None: it stays as it is
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ToHF:
    """A torch_dist checkpoint that was looked at, and the HF directory to make of it."""

    arch: Architecture
    checkpoint: TorchDist
    sources: dict[Unit, dict[str, Source]]  # unit -> first HF name of a row -> where it is
    like: Path  # the HF directory whose side files are taken
    base: CheckpointIndex | None  # of an HF checkpoint that has the units without a source
    out: Path
    dtype: str
    named_dtype: str | None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False


def to_megatron(job: ToMegatron) -> None:
    """Write the checkpoint and tell of it."""
    tensors, sizes = len(expected_tensors(job.arch)), unit_bytes(job.arch, job.dtype)
    total = sum(sizes.values())
    identity = {
        "format": FORMAT,
        "from": _files(job.index.model_dir),
        "layout": asdict(job.layout),
        "stages": list(job.stages.values()),
        "dtype": [job.dtype, job.named_dtype],
    }
    check_room(job.out, total + ENTRY_BYTES * tensors * job.layout.tp)
    casting = Casting(job.dtype)
    with _going_on(), unfinished(job.out, identity, overwrite=job.overwrite) as work:
        _cut_back(work)
        done = sum(sizes[unit] for unit in work.done)
        with Transfer("to Megatron", total, done=done) as transfer:
            for unit in units(job.arch):
                if unit not in work.done:
                    entries = _write_unit(job, unit, work.folder, casting)
                    work.note(unit, [asdict(entry) for entry in entries])
                    transfer.advance(sizes[unit], unit)
            entries = [Entry(**entry) for note in work.done.values() for entry in note]
            finish(work.folder, entries, getattr(torch, DTYPES[job.dtype]))
            (work.folder / SIDE).mkdir(exist_ok=True)
            copy_side_files(job.index.model_dir, work.folder / SIDE, dtype=job.named_dtype)
    for name in sorted(set(job.index.tensors) - set(expected_tensors(job.arch))):
        transfer.say(f"left out: {name}, which can be made of the others")
    _tell(transfer, casting, job.out, tensors)


def to_hf(job: ToHF) -> None:
    """Write the checkpoint and tell of it."""
    plan = ShardPlan(job.dtype, expected_tensors(job.arch), job.shard_bytes)
    sizes = unit_bytes(job.arch, job.dtype)
    identity = {
        "format": FORMAT,
        "from": [_files(job.checkpoint.path), _files(job.like)],
        "base": _files(job.base.model_dir) if job.base else None,
        "dtype": [job.dtype, job.named_dtype],
        "shard_bytes": job.shard_bytes,
    }
    check_room(job.out, plan.total_bytes())
    casting = Casting(job.dtype)
    with _going_on(), unfinished(job.out, identity, overwrite=job.overwrite) as work:
        writer = ShardWriter(work.folder, plan)
        done = sum(sizes[unit] for unit in work.done)
        with Transfer("to HF", plan.total_bytes(), done=done) as transfer:
            for unit in units(job.arch):
                if unit not in work.done:
                    for name, tensor in _read_unit(job, unit):
                        writer.put(name, casting(name, tensor))
                    writer.sync()
                    work.note(unit, None)
                    transfer.advance(sizes[unit], unit)
        writer.finish()
        copy_side_files(job.like, work.folder, dtype=job.named_dtype)
    _tell(transfer, casting, job.out, len(plan.tensors))


@dataclass
class Casting:
    """Casts to `dtype`; who had values that are no numbers."""

    dtype: str  # as safetensors names it
    not_finite: set[str] = field(default_factory=set)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        cast = tensor.to(getattr(torch, DTYPES[self.dtype]))
        if not _is_finite(cast):
            if _is_finite(tensor):
                reason = f"has values that {DTYPES[self.dtype]} cannot hold"
                raise InputError(name, reason, "choose another --dtype")
            self.not_finite.add(name)
        return cast


def _is_finite(tensor: Tensor) -> bool:
    """Are all values numbers? The least and the greatest are not where any is not, and are found
    thirty times faster than `isfinite` looks at each.
    """
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _write_unit(job: ToMegatron, unit: Unit, folder: Path, casting: Casting) -> list[Entry]:
    """Append `unit` to the ranks' files in `folder`, and have it on disk."""
    # Files are opened for a unit at a time: what has been read of a mapped file counts as memory.
    with ExitStack() as files:
        open_slice = slice_opener(job.index, files)

        def read(name: str, row: Row, shards: int, shard: int) -> Tensor:
            return casting(name, read_piece(open_slice(name), row, job.arch, shards, shard))

        holders = Holders(job.layout, stage_of(unit, job))
        entries = write_unit(unit, job.arch, holders, read, folder)
    for file in {entry.file for entry in entries}:
        sync(folder / file)
    return entries


def stage_of(unit: Unit, job: ToMegatron) -> int:
    """The pipeline stage that holds `unit`, and first."""
    if unit == "embedding":
        return 0
    return job.stages[int(unit.split()[1])] if unit.startswith("layer ") else job.layout.pp - 1


def _read_unit(job: ToHF, unit: Unit) -> Iterator[tuple[str, Tensor]]:
    """`(hf_name, tensor)` of `unit`, a row at a time."""
    for row in unit_rows(unit, job.arch, ep=1):
        if unit in job.sources:
            source = job.sources[unit][row.hf[0]]
            yield from read_row(row, source, job.checkpoint, job.arch).items()
            continue
        assert job.base is not None, "what has no source is in the base"
        with ExitStack() as files:
            open_slice = slice_opener(job.base, files)
            yield from ((name, open_slice(name)[:]) for name in row.hf)


def _cut_back(work: Unfinished) -> None:
    """Remove what was appended to the ranks' files after the last unit that is done."""
    ends: dict[str, int] = {}
    for entry in (entry for note in work.done.values() for entry in note):
        ends[entry["file"]] = max(ends.get(entry["file"], 0), entry["begin"] + entry["bytes"])
    for path in work.folder.glob("*.distcp"):
        with path.open("r+b") as file:
            file.truncate(ends.get(path.name, 0))


def unit_bytes(arch: Architecture, dtype: str) -> dict[Unit, int]:
    """Unit -> bytes of its tensors in `dtype`."""
    shapes = expected_tensors(arch)
    names = {
        unit: [name for row in unit_rows(unit, arch, ep=1) for name in row.hf]
        for unit in units(arch)
    }
    return {
        unit: sum(prod(shapes[name]) for name in held) * BITS[dtype] // 8
        for unit, held in names.items()
    }


def _files(folder: Path) -> list[Any]:
    """What a change of any file in `folder` would change."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in found]
    return [str(folder.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]


def check_room(out: Path, bytes_: int) -> None:
    """The disk has room for `bytes_`, less what a killed conversion has written of them."""
    there = partial_path(out).rglob("*")
    written = sum(512 * path.lstat().st_blocks for path in there if path.is_file())
    free = shutil.disk_usage(existing_ancestor(out)).free
    if free < bytes_ - written:
        reason = f"needs {in_bytes(bytes_ - written)}, and its disk has {in_bytes(free)} left"
        raise InputError(f"--out {out}", reason, "make room, or choose another disk")


@contextmanager
def _going_on() -> Iterator[None]:
    """A disk that is full or fails ends the conversion in one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(error)
        raise RunStopped(f"{reason}; the same command goes on where this one stopped") from error


def _tell(transfer: Transfer, casting: Casting, out: Path, tensors: int) -> None:
    for name in sorted(casting.not_finite):
        transfer.say(f"warning: {name} has values that are not finite")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    transfer.say(f"wrote {out}: {tensors} tensors, {in_bytes(size)} in {transfer.summary()}")
