"""What is in a torch_dist checkpoint, and is it all there? Read tensor by tensor by one process.

The whole tensor is put together from its chunks, whatever layout has cut them. Before anything is
read, chunks must tile their tensors, and files must be as long as `.metadata` says, so that a
checkpoint of which a file is missing or cut off is refused by name. `.metadata` is a pickle: it may
name nothing but the few classes that it is made of.
"""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from enum import Enum
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import read_json_object

COMMON_STATE = "common_state/shard_0_1"
MODEL = ("embedding.", "decoder.", "output_layer.")  # beside it: optimizer, rng
WAY_OUT = "restore it from a copy"
_ITS_MODULES = {
    f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")
}
_ITS_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_ITS_FUNCTIONS = {("collections", "OrderedDict"), ("torch.serialization", "_get_layout")}


class _Unpickler(pickle.Unpickler):
    """Records and constants that a DCP's metadata is made of, and nothing that could do harm."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ITS_FUNCTIONS:
            return super().find_class(module, name)
        found: Any = (
            super().find_class(module, name) if module in {*_ITS_MODULES, "torch"} else None
        )
        if module in _ITS_MODULES and isinstance(found, type):
            if dataclasses.is_dataclass(found) or issubclass(found, Enum):
                return found
        elif found is torch.Size or isinstance(found, _ITS_VALUES):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class TorchDist:
    """The model's tensors in the torch_dist directory `path`, all of them there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = _read_metadata(path)
        _check_what_megatron_reads(path, metadata)
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and key.startswith(MODEL)
        }
        if not self._tensors:
            reason = "holds no weights of a Megatron-Core GPT model"
            raise InputError(str(path), reason, "give the checkpoint of one")
        try:
            for key, tensor in self._tensors.items():
                self._check_that_chunks_tile(key, tensor)
            self._check_that_files_are_there()
        except (TypeError, AttributeError, LookupError) as error:  # no numbers where they should be
            reason = f"is damaged: what it says of the weights makes no sense ({error})"
            raise InputError(str(path / ".metadata"), reason, WAY_OUT) from None

    @property
    def keys(self) -> list[str]:
        """Of the model's tensors."""
        return list(self._tensors)

    def __contains__(self, key: str) -> bool:
        """Is there such a tensor of the model?"""
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As it is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, at: tuple[int, ...] = ()) -> Tensor:
        """The tensor `key` at the leading indices `at`; no other chunks are read."""
        tensor = self._tensors[key]
        whole: Tensor | None = None
        for chunk in tensor.chunks:
            inside = [i - o for i, o in zip(at, chunk.offsets, strict=False)]
            if not all(0 <= i < n for i, n in zip(inside, chunk.sizes, strict=False)):
                continue
            part = self._read_chunk(key, tensor, chunk)[tuple(inside)]
            if part.shape == tensor.size[len(at) :]:
                return part
            if whole is None:
                whole = torch.empty(tensor.size[len(at) :], dtype=part.dtype)
            offsets = chunk.offsets[len(at) :]
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
        assert whole is not None, "chunks tile the tensor"
        return whole

    def _read_chunk(
        self, key: str, tensor: TensorStorageMetadata, chunk: ChunkStorageMetadata
    ) -> Tensor:
        place = self._place(key, chunk)
        path = self.path / place.relative_path
        try:
            with path.open("rb") as file:
                view: Any = _create_file_view(file, place.offset, place.length)
                part = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, for what is no zip, no pickle, no tensor
            reason = f"is damaged: {key} cannot be read from it ({type(error).__name__})"
            raise InputError(str(path), reason, WAY_OUT) from None
        stored = part.shape, part.dtype
        if stored != (chunk.sizes, tensor.properties.dtype):
            reason = f"is damaged: its part of {key} is {part.dtype} {list(part.shape)}"
            raise InputError(str(path), reason, WAY_OUT)
        return part

    def _place(self, key: str, chunk: ChunkStorageMetadata) -> Any:
        place = self._places.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            reason = f"does not say where the part of {key} at {list(chunk.offsets)} is"
            raise InputError(str(self.path / ".metadata"), reason, WAY_OUT)
        return place

    def _check_that_chunks_tile(self, key: str, tensor: TensorStorageMetadata) -> None:
        """Every element lies in just one chunk: chunks are the cells of a grid."""
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
        size = tuple(tensor.size)
        starts = [sorted({offsets[d] for offsets in chunks}) for d in range(len(size))]
        lengths = [
            {first: after - first for first, after in pairwise([*begins, whole])}
            for begins, whole in zip(starts, size, strict=True)
        ]
        tiles = all(
            chunks.get(cell) == tuple(of[i] for of, i in zip(lengths, cell, strict=True))
            for cell in product(*starts)
        )
        begins_at_zero = all(begins[:1] == [0] for begins in starts)
        if not (tiles and begins_at_zero and len(chunks) == len(tensor.chunks)):
            reason = f"is damaged: its parts of {key} do not make up {list(size)}"
            raise InputError(str(self.path / ".metadata"), reason, WAY_OUT)

    def _check_that_files_are_there(self) -> None:
        """Files are as long as what lies in them, and no two things lie in one place."""
        spans: dict[str, list[tuple[int, int, str]]] = {}
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                self._check_length(key, self._place(key, chunk), chunk, tensor)
        for index, place in self._places.items():
            span = place.offset, place.offset + place.length, index.fqn
            spans.setdefault(place.relative_path, []).append(span)
        for name, held in spans.items():
            path = self.path / name
            if Path(name).name != name or not path.is_file():
                reason = "no such file, but .metadata says that it holds weights"
                raise InputError(str(path), reason, WAY_OUT)
            if (bytes_ := path.stat().st_size) < (end := max(end for _, end, _ in held)):
                reason = f"is truncated: {bytes_} bytes, of at least {end}"
                raise InputError(str(path), reason, WAY_OUT)
            for (_, end, before), (begin, _, key) in pairwise(sorted(held)):
                if begin < end:
                    reason = f"is damaged: it has {key} and {before} in one place of {name}"
                    raise InputError(str(self.path / ".metadata"), reason, WAY_OUT)

    def _check_length(
        self, key: str, place: Any, chunk: ChunkStorageMetadata, tensor: TensorStorageMetadata
    ) -> None:
        data = prod(chunk.sizes) * tensor.properties.dtype.itemsize
        if place.offset < 0 or place.length < data:
            reason = (
                f"is damaged: it has {key} at byte {place.offset} of {place.relative_path} in "
                f"{place.length} bytes, of at least {data}"
            )
            raise InputError(str(self.path / ".metadata"), reason, WAY_OUT)


def _read_metadata(path: Path) -> Metadata:
    file = path / ".metadata"
    try:
        with file.open("rb") as opened:
            metadata = _Unpickler(opened).load()
        assert isinstance(metadata, Metadata)
        assert isinstance(metadata.storage_data, dict)
        assert isinstance(metadata.state_dict_metadata, dict)
    except FileNotFoundError:
        reason = "no such file: this is not a torch_dist checkpoint, or a half-written one"
        raise InputError(str(file), reason, "give the directory of a complete one") from None
    except Exception as error:  # whatever other bytes unpickle to
        reason = f"is not the metadata of a torch_dist checkpoint ({error or type(error).__name__})"
        raise InputError(str(file), reason, WAY_OUT) from None
    return metadata


def _check_what_megatron_reads(path: Path, metadata: Metadata) -> None:
    """What stands beside tensors is not needed here; where it is damaged, so may be more.
    Newer releases (0.19) have it as an object among them.
    """
    file = path / "metadata.json"
    if read_json_object(file).get("sharded_backend") != "torch_dist":
        raise InputError(str(file), "does not say sharded_backend: torch_dist", WAY_OUT)
    common = path / "common.pt"
    if not common.exists() and COMMON_STATE in metadata.state_dict_metadata:
        return
    if not zipfile.is_zipfile(common):
        raise InputError(str(common), "is missing or damaged", WAY_OUT)
