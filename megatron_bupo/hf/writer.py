"""Tensors written as a Hugging Face checkpoint directory, byte for byte as transformers writes it.

Names, shapes and dtypes are known before the first tensor is, so the files are laid out first and
each tensor is written to its place when it comes, in any order: no more than one is held, and what
is written stays written if the rest has to wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.durable import partial_path, put_in_place, sync
from megatron_bupo.hf.headers import BITS, Shape
from megatron_bupo.hf.tensors import SHARD_INDEX, SINGLE_FILE

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4 * 2**30
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CHAT_TEMPLATES = "additional_chat_templates"  # the one directory that belongs to a checkpoint
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".gguf",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
)


@dataclass(frozen=True)
class ShardPlan:
    """Which file of `tensors` (name -> shape, in model order, one dtype) holds which."""

    dtype: str  # as safetensors names it
    tensors: Mapping[str, Shape]
    shard_bytes: int = SHARD_BYTES

    def bytes_of(self, name: str) -> int:
        """Of data."""
        return prod(self.tensors[name]) * BITS[self.dtype] // 8

    def total_bytes(self) -> int:
        """Of data, in all files."""
        return sum(map(self.bytes_of, self.tensors))

    def files(self) -> dict[str, list[str]]:
        """File -> its tensors; a new file begins where the next tensor would not fit."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.tensors:
            if shards[-1] and size + self.bytes_of(name) > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self.bytes_of(name)
        if len(shards) == 1:
            return {SINGLE_FILE: shards[0]}
        return {
            f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
            for i, shard in enumerate(shards, start=1)
        }

    def header(self, names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
        """What stands before the data of a file with these tensors, and where each begins."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name in sorted(names):  # as safetensors orders those of one dtype
            places[name], end = end, end + self.bytes_of(name)
            shape = list(self.tensors[name])
            offsets = [places[name], end]
            entries[name] = {"dtype": self.dtype, "shape": shape, "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + place for name, place in places.items()}

    def index(self) -> str | None:
        """The file that says which shard holds which tensor; None: there is one file."""
        files = self.files()
        if len(files) == 1:
            return None
        parameters = sum(map(prod, self.tensors.values()))
        sizes = {"total_parameters": parameters, "total_size": self.total_bytes()}
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": sizes, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """The files of `plan` in `folder`; what they hold already stays."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.folder, self.plan = folder, plan
        self._place: dict[str, tuple[Path, int]] = {}
        self._unsynced: set[Path] = set()
        for file, names in plan.files().items():
            head, begins = plan.header(names)
            self._place |= {name: (folder / file, begin) for name, begin in begins.items()}
            with (folder / file).open("ab"):
                pass
            with (folder / file).open("r+b") as opened:
                opened.write(head)
                opened.truncate(len(head) + sum(map(plan.bytes_of, names)))

    def put(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` to its place."""
        import torch

        dtype = str(tensor.dtype).removeprefix("torch.")
        if (DTYPES[self.plan.dtype], self.plan.tensors[name]) != (dtype, tuple(tensor.shape)):
            raise ValueError(
                f"{name} is {dtype} {list(tensor.shape)}, which is not what was laid out"
            )
        file, begin = self._place[name]
        self._unsynced.add(file)
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with file.open("r+b") as opened:
            opened.seek(begin)
            opened.write(numbers.data)

    def sync(self) -> None:
        """Have all that was put on disk."""
        while self._unsynced:
            sync(self._unsynced.pop())

    def finish(self) -> None:
        """Write the index, where there is one."""
        if index := self.plan.index():
            (self.folder / SHARD_INDEX).write_text(index, encoding="utf-8")


def write_checkpoint(
    out: Path,
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    *,
    like: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `weights`, which are just those of `shapes`, to the directory `out`, with config and
    tokenizer files copied from `like`.

    `dtype` is the weights' (`float32`, `bfloat16`) and is written to config.json. An existing `out`
    is replaced only once the new one is complete.
    """
    work = partial_path(out)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    copy_side_files(like, work, dtype=dtype)
    stored = next(name for name, meant in DTYPES.items() if meant == dtype)
    writer = ShardWriter(work, ShardPlan(stored, shapes, shard_bytes))
    missing = dict.fromkeys(shapes)
    for name, tensor in weights:
        writer.put(name, tensor)
        missing.pop(name, None)
    if missing:
        raise ValueError(f"the weights have come without {', '.join(missing)}")
    writer.finish()
    put_in_place(work, out)


def copy_side_files(like: Path, out: Path, *, dtype: str | None = None) -> None:
    """Copy to the directory `out` all that stands beside the weights of the HF directory `like`;
    with a `dtype`, its config.json names that one, and is else as it was to the byte.
    """
    for file in side_files(like):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(like / file, out / file)
    if dtype is not None:
        _name_dtype(out / "config.json", dtype)


def side_files(folder: Path) -> list[Path]:
    """Config, tokenizer, chat templates, ... of an HF directory, relative to it."""
    files = [*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")]
    return sorted(
        file.relative_to(folder)
        for file in files
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHT_SUFFIXES)
    )


def _name_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    if any(str(config.get(key)).removeprefix("torch.") != dtype for key in keys):
        config |= dict.fromkeys(keys, dtype)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
