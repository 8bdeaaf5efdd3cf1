"""What the loop asks of a rollout engine, whoever implements it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.types import Prompt, RolloutGroup, Sampling


class RolloutEngine(Protocol):
    """Prompts in, responses of the full policy out. Every rank calls every method with equal
    arguments.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """A group per prompt, in order, the same on every rank."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take over `(hf_name, full tensor)` pairs; what is not in the stream stays as it is."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...
