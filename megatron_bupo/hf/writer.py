"""A stream of `(hf_name, tensor)` written as a Hugging Face checkpoint directory.

Shards are written as the stream flows, so one shard is held at a time. The directory appears under
its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4 * 2**30
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".gguf",
    ".pt",
    ".pth",
)


def write_checkpoint(
    out: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `weights` to the new directory `out`, with config and tokenizer files copied from
    `like`.

    `dtype` is the weights' (`float32`, `bfloat16`) and is written to config.json. An existing `out`
    is replaced only once the new one is complete.
    """
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _copy_side_files(like, work, dtype)
    _write_shards(work, weights, shard_bytes)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    work.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _copy_side_files(like: Path, out: Path, dtype: str) -> None:
    for file in like.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith(WEIGHT_SUFFIXES)
        ):
            shutil.copy2(file, out / file.name)
    config = json.loads((out / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_shards(out: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    names: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            save_file(held, out / f"shard-{len(names)}.safetensors", metadata={"format": "pt"})
            names.append(list(held))
            held, size = {}, 0

    for name, tensor in weights:
        bytes_ = tensor.numel() * tensor.element_size()
        if size + bytes_ > shard_bytes:
            flush()
        # A copy of its own: the stream's tensors are views into a buffer that is larger than they
        # are.
        held[name] = tensor.detach().cpu().clone().contiguous()
        size, total = size + bytes_, total + bytes_
    flush()
    _name_shards(out, names, total)


def _name_shards(out: Path, names: list[list[str]], total_bytes: int) -> None:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` with an index, as transformers
    reads them.
    """
    if len(names) == 1:
        (out / "shard-0.safetensors").replace(out / "model.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (out / f"shard-{i}.safetensors").replace(out / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
