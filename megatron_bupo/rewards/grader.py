"""How are responses graded without a reward function being able to stop the run?

Each rank grades its share, and the grades are gathered. Functions run in processes of their own
(`pool.py`, `process.py`, `worker.py`), each call within a time and a memory limit; a remote grader
is asked over HTTP (`remote.py`). What fails costs its own rollout the value of that term. The one
failure that stops a run is a remote grader that has graded nothing of a whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

from megatron_bupo import collective
from megatron_bupo.config.reward_rules import is_url, terms_of
from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.errors import RunStopped
from megatron_bupo.rewards.functions import absolute
from megatron_bupo.rewards.pool import Pool
from megatron_bupo.rewards.remote import RemoteGrader
from megatron_bupo.rewards.terms import composed
from megatron_bupo.rewards.worker import Limits
from megatron_bupo.types import Grade, Rollout, RolloutGroup


class Grading(Protocol):
    """Where grades come from."""

    def grade(self, groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
        """A grade per rollout, in the shape of `groups`, the same on every rank. Collective."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class Grader:
    """Grades rollouts as `reward` says, in processes of which one starts at once and all end with
    ours. `max_response_tokens` is for the terms that ask for it.
    """

    def __init__(self, reward: RewardConfig, *, max_response_tokens: int | None = None) -> None:
        self._is_composed = bool(reward.terms)
        # A later chdir must not matter
        self._terms = [replace(t, function=absolute(t.function)) for t in terms_of(reward)]
        self._remote = [
            RemoteGrader(term, reward.timeout_s) if is_url(term.function) else None
            for term in self._terms
        ]
        local = [term for term in self._terms if not is_url(term.function)]
        limits = Limits(reward.timeout_s, reward.memory_mb, max_response_tokens)
        self._pool = Pool(local, limits, reward.processes) if local else None

    def grade(self, groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
        """A grade per rollout, in the shape of `groups`, the same on every rank. Collective."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        values = collective.gather(self._values(collective.share(rollouts)))
        self._stop_without_a_grader(values)
        grades = (composed(self._terms, v) if self._is_composed else v[0] for v in values)
        return [list(islice(grades, len(group.rollouts))) for group in groups]

    def close(self) -> None:
        """End the grading processes."""
        if self._pool is not None:
            self._pool.close()

    def _values(self, rollouts: Sequence[Rollout]) -> list[list[Grade]]:
        """The grade of every term for each rollout."""
        remote = [None if r is None else iter(r.grade(rollouts)) for r in self._remote]
        local = [[]] * len(rollouts) if self._pool is None else self._pool.grade(rollouts)
        values = []
        for of_functions in local:
            functions = iter(of_functions)
            values.append([next(functions if r is None else r) for r in remote])
        return values

    def _stop_without_a_grader(self, values: Sequence[Sequence[Grade]]) -> None:
        for i, term in enumerate(self._terms):
            if self._remote[i] is not None and values and all(v[i].warning for v in values):
                raise RunStopped(
                    f"{term.where}: none of {len(values)} responses was graded "
                    f"({values[0][i].warning}); start it again and then the run"
                )
