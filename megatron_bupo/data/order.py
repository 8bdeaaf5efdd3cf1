"""Which prompts does a step ask? A pure function of seed and step, so resuming needs no state.

The epochs follow each other as one endless row of prompts, each epoch in an order of its own; step
s takes the prompts s * prompts_per_step onwards. So no prompt comes twice within an epoch, none is
left out at its end, and a data set smaller than a step is gone through more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from megatron_bupo.types import Prompt


class PromptStream:
    """An endless, resumable supply of prompts."""

    def __init__(
        self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool = True
    ) -> None:
        self._prompts = prompts
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle

    def prompts_at(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` prompts of `step`, counted from 0."""
        first = step * self._prompts_per_step
        return [self._at(position) for position in range(first, first + self._prompts_per_step)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if self._shuffle:
            place = _permutation(self._seed, epoch, len(self._prompts))[place]
        return self._prompts[place]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    # a string seed is hashed with SHA-512: the same everywhere, and no two (seed, epoch) alike
    Random(f"{seed}/{epoch}").shuffle(order)
    return order
