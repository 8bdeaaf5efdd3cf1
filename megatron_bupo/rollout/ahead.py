"""Responses step by step, generated while earlier steps train.

The weights have version s when step s samples. With a staleness of 1, say::

    the loop      asks for step s      trains step s      syncs version s + 1, asks for step s + 1
    the engine    draws s, s + 1       draws s + 1        draws s + 1, s + 2

So a step is begun as soon as the weights are at most its staleness behind it, and no response is
drawn by older ones. With a staleness of 0 a step is begun when it is asked for: strictly on-policy.

Which prompts and which seed a step has is a function of its number, so a resumed run, which begins
anew what was under way, loses nothing and repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_bupo.rollout.engine import Pending, RolloutEngine
    from megatron_bupo.types import Prompt, RolloutGroup, Sampling


class RolloutStream:
    """The responses of the steps from `first_step` to before `last_step`, each step once."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts_at: Callable[[int], Sequence[Prompt]],
        sampling_at: Callable[[int], Sampling],
        *,
        first_step: int,
        last_step: int,
        staleness_at: Callable[[int], int],
        resting_steps: int = 0,
        recorded: bool = False,
    ) -> None:
        """`staleness_at(step)`: how many updates the weights that it samples from may be behind.
        `resting_steps`: at the start leave the weights what they are, at version 0. `recorded`:
        responses come from an earlier run and may be of any weights.
        """
        self.engine, self.prompts_at, self.sampling_at = engine, prompts_at, sampling_at
        self.last_step, self.staleness_at, self.recorded = last_step, staleness_at, recorded
        self.resting_steps = resting_steps
        self._next = first_step  # to begin
        self._under_way: dict[int, tuple[float, Pending]] = {}  # by step, and since when
        self._measures: dict[str, float] = {}

    def at(self, step: int) -> list[RolloutGroup]:
        """The responses of `step`, the same on every rank, when the weights have learned from all
        steps before it. Steps are asked for in order. Collective.
        """
        asked = time.monotonic()
        while self._next < self.last_step and self._next - self.staleness_at(self._next) <= step:
            pending = self.engine.begin(self.prompts_at(self._next), self.sampling_at(self._next))
            self._under_way[self._next] = time.monotonic(), pending
            self._next += 1
        began, pending = self._under_way.pop(step)
        groups = pending.collect()
        version = max(0, step - self.resting_steps)
        behind = [version - r.policy_version for group in groups for r in group.rollouts]
        self._check(step, version, behind)
        self._measures = {
            "rollout/staleness_mean": fmean(behind),
            "rollout/staleness_max": float(max(behind)),
        }
        if began < asked:
            self._measures["time/ahead_s"] = asked - began
        return groups

    def further(self, place: int, count: int) -> list[RolloutGroup]:
        """The first `count` groups of a step that is out of reach, by the present weights; see
        dynamic_sampling.py. Collective.
        """
        return self.engine.generate(self.prompts_at(place)[:count], self.sampling_at(place))

    def measures(self) -> dict[str, float]:
        """Of the step asked for last: how many updates behind the weights were that responses were
        begun with, and how long they had been under way when they were asked for.
        """
        return self._measures

    def _check(self, step: int, version: int, behind: Sequence[int]) -> None:
        """No response is older than its step allows, nor of weights that are yet to come."""
        most = self.staleness_at(step)
        wrong = [n for n in behind if not 0 <= n <= most]
        if wrong and not self.recorded:
            raise RuntimeError(
                f"a response of step {step} was drawn with weights of version "
                f"{version - wrong[0]}; allowed are versions {version - most} to {version}"
            )
