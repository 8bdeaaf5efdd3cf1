"""Tensors of an HF checkpoint, read slice by slice: a rank that needs a part reads only that
part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_bupo.hf.tensors import CheckpointIndex


def slice_opener(index: CheckpointIndex, stack: ExitStack) -> Callable[[str], Any]:
    """`open_slice(hf_name)` -> a lazy slice of that tensor; files are open until `stack` closes."""
    from safetensors import safe_open

    files: dict[Path, Any] = {}

    def open_slice(name: str) -> Any:
        file = index.tensors[name].file
        if file not in files:
            files[file] = stack.enter_context(safe_open(str(file), "pt"))
        return files[file].get_slice(name)

    return open_slice
