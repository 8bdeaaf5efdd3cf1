"""Weights that no actor holds, as `Weights`: some in memory, or a checkpoint directory's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from megatron_bupo import collective
from megatron_bupo.hf.tensors import read_index

if TYPE_CHECKING:
    from torch import Tensor


class _OneStage:
    """All ranks can reach all of them; the first one sends them."""

    stages, stage = 1, 0

    def __init__(self) -> None:
        self.sends = collective.is_first()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """All of them."""
        return iter(self)


class WholeWeights(_OneStage):
    """`tensors` by HF name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


class StoredWeights(_OneStage):
    """All of a checkpoint directory, read tensor by tensor."""

    def __init__(self, model_dir: str | Path) -> None:
        super().__init__()
        self.index = read_index(model_dir)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self.index.tensors.items():
            with safe_open(stored.file, framework="pt") as file:
                yield name, file.get_tensor(name)
