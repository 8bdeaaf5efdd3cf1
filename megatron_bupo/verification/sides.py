"""A checkpoint that is compared with another: what it holds, by HF name, wherever it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.tensors import is_harmless, read_index

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    torch_dist: Path | None = None  # None: an HF directory


def open_hf(path: Path, stack: ExitStack) -> Side:
    """The HF directory `path`; its files stay open until `stack` closes."""
    architecture, index = read_architecture(path), read_index(path)
    files: dict[Path, Any] = {}

    def read(name: str) -> Tensor:
        file = index.tensors[name].file
        if file not in files:
            files[file] = stack.enter_context(safe_open(str(file), "pt"))
        return files[file].get_tensor(name)

    tensors = {
        name: Stored(DTYPES.get(found.dtype, found.dtype), found.shape)
        for name, found in index.tensors.items()
        if not is_harmless(name, architecture)
    }
    return Side(path, path, architecture, tensors, read)
