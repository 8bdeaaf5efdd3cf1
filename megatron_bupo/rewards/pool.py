"""As many grading processes as it takes: one, and where that is not done in a second, more of them.

The rollouts of a prompt stay together: they share a reference answer and often an answer, so what
one process has found out about them is looked up and not worked out again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from threading import Event

from megatron_bupo.config.reward_rules import Term
from megatron_bupo.rewards.process import GradingProcess
from megatron_bupo.rewards.worker import Limits
from megatron_bupo.types import Grade, Rollout

_HELP_AFTER_S = 1.0
_MOST = 8


def own_cores() -> int:
    """The cores that there are for each rank of this machine."""
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(cores // ranks, 1)


class Pool:
    """Up to `size` grading processes (None: a core each, at most 8); the first starts at once."""

    def __init__(self, terms: Sequence[Term], limits: Limits, size: int | None) -> None:
        self._terms, self._limits = terms, limits
        self._size = size or min(own_cores(), _MOST)
        self._first = GradingProcess(terms, limits)
        self._others: list[GradingProcess | None] = [None] * (self._size - 1)
        # The processes die with the thread that started them, so the threads stay
        self._threads = [ThreadPoolExecutor(1, "grading") for _ in self._others]

    def grade(self, rollouts: Sequence[Rollout]) -> list[list[Grade]]:
        """The grades of each rollout, one per term."""
        prompts = [list(group) for _, group in groupby(rollouts, key=lambda r: r.prompt.index)]
        todo, done = deque(enumerate(prompts)), [[] for _ in prompts]
        finished = Event()

        def work(process: GradingProcess) -> None:
            while todo:
                try:
                    place, group = todo.popleft()
                except IndexError:  # another one took it
                    return
                done[place] = process.grade(group)

        def help_out(number: int) -> None:
            process = self._others[number]
            if process is None:
                if finished.wait(_HELP_AFTER_S) or not todo:
                    return
                process = self._others[number] = GradingProcess(self._terms, self._limits)
            work(process)

        helping = [
            thread.submit(help_out, number)
            for number, thread in enumerate(self._threads[: len(prompts) - 1])
        ]
        try:
            work(self._first)
        finally:
            todo.clear()
            finished.set()
        for help_ in helping:
            help_.result()
        return [grades for group in done for grades in group]

    def close(self) -> None:
        """End the processes."""
        for process in (self._first, *self._others):
            if process is not None:
                process.close()
        for thread in self._threads:
            thread.shutdown()
