"""The torch_dist checkpoint that ranks of a layout would save, written by one process from HF
tensors.

Such a checkpoint is a file per rank, `__{rank}_0.distcp`, of tensors that `torch.save` has written
one after the other, and `.metadata`, which says what tensors there are and which chunk of each lies
where. No rank and no model is needed for it: `hf_weights`' table tells which HF tensors make up a
parameter and how tensor parallelism cuts them, the layout tells which rank has which piece. A piece
is read, written to its rank's file and dropped.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bupo.config.layout import Layout
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.mcore.hf_weights import Row, Unit, is_stacked, unit_rows

METADATA = {
    # The optimizer's state in a form that every other tensor, pipeline and data-parallel layout
    # can read.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # Layers under keys of their own, not stacked in one tensor.
    "non_homogeneous_layers": True,
}
_HAS_EXTRA_STATE = re.compile(r".*\.linear_\w+\.weight")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """What lies in a file: a chunk of a tensor, or an object, which has neither offsets nor
    shape.
    """

    key: str
    offsets: Shape | None
    sizes: Shape | None
    shape: Shape | None  # of the whole tensor
    file: str
    begin: int
    bytes: int


@dataclass(frozen=True)
class Holders:
    """The ranks that save a unit: those of `stage` that are the first to hold what they hold."""

    layout: Layout
    stage: int

    def shards(self, row: Row) -> int:
        """Into how many pieces the tensors of `row` are cut."""
        if row.cut is None:
            return 1
        layout = self.layout
        return layout.tp if row.expert is None else layout.etp or layout.tp

    def rank(self, row: Row, shard: int, experts: int) -> int:
        """The rank that saves piece `shard` of `row`, where there are `experts` of them."""
        first = self.layout.stage_ranks(self.stage)[0]
        if row.expert is None:
            return first + shard
        group = row.expert // (experts // self.layout.ep)
        return first + group * self.shards(row) + shard


ReadPiece = Callable[[str, Row, int, int], Tensor]  # (HF name, row, shards, shard) -> its piece


def key_prefix(unit: Unit) -> str:
    """What stands before the names of the table in the checkpoint's keys."""
    return f"decoder.layers.{int(unit.split()[1]) - 1}." if unit.startswith("layer ") else ""


def key_names(row: Row) -> tuple[str, ...]:
    """The names of `row` in checkpoints, the usual one first; all experts share one tensor."""
    if row.expert is not None:
        return (re.sub(r"local_experts\.\d+", "experts", row.megatron[0]),)
    return row.megatron[::-1]


def write_unit(
    unit: Unit, arch: Architecture, holders: Holders, read: ReadPiece, folder: Path
) -> list[Entry]:
    """Append `unit` to the files of the ranks that hold it; what was written."""
    experts = arch.experts.number if arch.experts else 1
    written = []
    for row in unit_rows(unit, arch, ep=1):
        key, shards = key_prefix(unit) + key_names(row)[0], holders.shards(row)
        for shard in range(shards):
            file = file_of(holders.rank(row, shard, experts))
            pieces = tuple(read(name, row, shards, shard) for name in row.hf)
            for offsets, shape, chunk in _chunks(row, pieces, arch, shards, shard):
                begin, bytes_ = _append(folder / file, chunk)
                sizes = tuple(chunk.shape)
                written.append(Entry(key, offsets, sizes, shape, file, begin, bytes_))
        if _HAS_EXTRA_STATE.fullmatch(key):
            file = file_of(holders.rank(row, 0, experts))
            begin, bytes_ = _append(folder / file, [None])
            place = "0_1" if row.expert is None else f"{row.expert}_{experts}"
            name = f"{key.removesuffix('weight')}_extra_state/shard_{place}"
            written.append(Entry(name, None, None, None, file, begin, bytes_))
    return written


def file_of(rank: int) -> str:
    """The file of `rank`."""
    return f"__{rank}_0.distcp"


def _chunks(
    row: Row, pieces: Sequence[Tensor], arch: Architecture, shards: int, shard: int
) -> Iterator[tuple[Shape, Shape, Tensor]]:
    """`(offsets, shape of the whole tensor, chunk)` of one shard's `pieces`. Where pieces are
    stacked, each is a chunk: cut by another number of ranks, they are no longer neighbours.
    """
    parts = list(pieces) if is_stacked(row) else [row.join(tuple(pieces), arch)]
    for i, part in enumerate(parts):
        offsets, shape = [0] * part.dim(), list(part.shape)
        if row.cut is not None:
            offsets[row.cut] = shard * shape[row.cut]
            shape[row.cut] *= shards
        if len(parts) > 1:
            offsets[0] += i * shape[0]
            shape[0] *= len(parts)
        chunk = part
        if row.expert is not None:
            assert arch.experts is not None
            offsets, shape = [row.expert, *offsets], [arch.experts.number, *shape]
            chunk = part.unsqueeze(0)
        yield tuple(offsets), tuple(shape), chunk


def _append(path: Path, content: Tensor | list[None]) -> tuple[int, int]:
    """Where in the file `path` `content` now is, and its bytes there."""
    if isinstance(content, Tensor):
        content = content.contiguous()
        if content.untyped_storage().nbytes() != content.nbytes:  # all of which would be written
            content = content.clone()
    with path.open("ab") as file:
        begin = file.seek(0, io.SEEK_END)
        try:
            torch.save(content, file)
        except RuntimeError as error:  # from closing the archive that a full disk cut off
            raise error.__context__ or error from None
        return begin, file.tell() - begin


def finish(folder: Path, entries: Iterable[Entry], dtype: torch.dtype) -> None:
    """Write what says which of `entries`, chunks in `dtype`, lies where."""
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage = {}
    for entry in entries:
        # Equal strings as one object: a pickle shows which were, and bytes are to hang on content.
        key, file = sys.intern(entry.key), sys.intern(entry.file)
        storage[MetadataIndex(key, entry.offsets)] = _StorageInfo(file, entry.begin, entry.bytes)
        if entry.offsets is None or entry.sizes is None or entry.shape is None:
            state[key] = BytesStorageMetadata()
            continue
        empty = TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry.shape), [])
        tensor = state.setdefault(key, empty)
        assert isinstance(tensor, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes))
        tensor.chunks.append(chunk)
    metadata = Metadata(state, storage_data=storage, storage_meta=StorageMeta())
    metadata.version = "1.0.0"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    # The version is that of the order of queries, keys and values: without it Megatron-LM takes
    # them for the oldest and rearranges them.
    common = {"content_metadata": dict(METADATA), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
