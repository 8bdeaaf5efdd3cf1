"""Which prompts does a step ask? A pure function of seed and step, so resuming needs no state.

The epochs of a source follow each other as one endless row of prompts, each epoch in an order of
its own. So no prompt comes twice within an epoch, none is left out at its end, and a data set
smaller than a step is gone through more than once. Step s takes the prompts s * prompts_per_step
onwards.

Of several sources, each position belongs to one, which gives the next of its own row. Who it is
follows R. Tijdeman, "The chairman assignment problem" (1980): source i with the share w_i may give
its j-th prompt (from 0) once w_i * positions >= j + d, and must before that exceeds j + 1 - d,
where d = 1 / (2 sources - 2); of those that may, the one that must soonest does. At every position,
each source has then given its share to within 1 - d; so any window holds its share to within
2 - 2d, of two sources to within 1. (No schedule does so for every window of three or more.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from random import Random

from megatron_bupo.types import Prompt


class PromptStream:
    """An endless, resumable supply of prompts from one source or a mixture."""

    def __init__(
        self,
        *sources: Sequence[Prompt],
        weights: Sequence[float] | None = None,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """`weights`: shares of the sources, relative to each other; None: equal ones."""
        self._sources = sources
        self._turns = Turns(weights or [1.0] * len(sources))
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle

    def prompts_at(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` prompts of `step`, counted from 0."""
        first = step * self._prompts_per_step
        return [self._at(position) for position in range(first, first + self._prompts_per_step)]

    def first(self, count: int) -> list[Prompt]:
        """The first prompts that are asked, each once; at most `count`."""
        size = sum(map(len, self._sources))
        asked = {p.index: p for p in (self._at(i) for i in range(min(count, size)))}
        return list(asked.values())

    def _at(self, position: int) -> Prompt:
        source, position = self._turns.at(position)
        prompts = self._sources[source]
        epoch, place = divmod(position, len(prompts))
        if self._shuffle:
            own = f"{source}/" if source else ""  # the first as if it were alone
            place = _permutation(f"{self._seed}/{own}{epoch}", len(prompts))[place]
        return prompts[place]


class Turns:
    """Whose turn is it? Weights are taken as the decimals that they are written as, so that the
    order repeats exactly after as many positions as their whole-number ratio sums to.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        self._weights = [weight // gcd(*whole) for weight in whole]
        self._period = sum(self._weights)
        self._owners = array("L")  # of the positions so far, within a period
        self._places = array("L")  # how many that owner had before
        self._given = [0] * len(weights)

    def at(self, position: int) -> tuple[int, int]:
        """The source whose turn `position` is, and the number of turns that it had before."""
        if len(self._weights) == 1:
            return 0, position
        period, within = divmod(position, self._period)
        while len(self._owners) <= within:
            self._take_turn()
        owner = self._owners[within]
        return owner, period * self._weights[owner] + self._places[within]

    def _take_turn(self) -> None:
        d = 2 * len(self._weights) - 2
        positions, least = len(self._owners) + 1, None
        for source, weight in enumerate(self._weights):
            given = self._given[source]
            if positions * weight * d < (given * d + 1) * self._period:
                continue  # may not yet
            late = ((given + 1) * d - 1, weight)  # must before this ratio x period / d
            if least is None or late[0] * least[1][1] < least[1][0] * late[1]:
                least = source, late
        assert least is not None, "Tijdeman: somebody always may"
        self._owners.append(least[0])
        self._places.append(self._given[least[0]])
        self._given[least[0]] += 1


@lru_cache(maxsize=64)  # more than there are sources
def _permutation(seed: str, size: int) -> list[int]:
    order = list(range(size))
    # a string seed is hashed with SHA-512: the same everywhere, and no two (seed, epoch) alike
    Random(seed).shuffle(order)
    return order
