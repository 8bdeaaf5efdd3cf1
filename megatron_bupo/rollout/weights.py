"""Weights that no actor holds, as `Weights`: some in memory, or a checkpoint directory's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from megatron_bupo import collective
from megatron_bupo.hf.tensors import read_index

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.types import Weights

_LAYER = re.compile(r"\blayers\.(\d+)\.")  # in an HF name; counted from 0


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
    """Those of a checkpoint directory, read tensor by tensor."""

    def __init__(self, model_dir: str | Path, *, above_layer: int | None = None) -> None:
        """All, or only those of the layers above `above_layer`, counted from 1."""
        super().__init__()
        self.tensors = {
            name: stored
            for name, stored in read_index(model_dir).tensors.items()
            if above_layer is None or _layer(name) > above_layer
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self.tensors.items():
            with safe_open(stored.file, framework="pt") as file:
                yield name, file.get_tensor(name)


class Together:
    """What the actor holds, `lower`, and what it does not, `upper`: its last stage sends that."""

    def __init__(self, lower: Weights, upper: StoredWeights) -> None:
        self.lower, self.upper = lower, upper
        self.stages, self.stage, self.sends = lower.stages, lower.stage, lower.sends

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.lower
        yield from self.upper

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """The actor's part of the stage, and on the last stage the rest."""
        yield from self.lower.of_stage()
        if self.stage == self.stages - 1:
            yield from self.upper


def _layer(name: str) -> int:
    """Counted from 1; 0 for what belongs to none."""
    found = _LAYER.search(name)
    return int(found[1]) + 1 if found else 0
