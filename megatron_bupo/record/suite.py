"""What does a person watching an evaluation see? A bar per benchmark in a terminal, elsewhere a
line per batch.

::

    AIME24  128/500 questions  avg 0.369  8120 tok/s          (one line in a log)
"""

from __future__ import annotations

import time

from megatron_bupo.record.bar import Bars


class SuiteDisplay(Bars):
    """The suite as it goes: benchmarks, one after the other."""

    def begin(self, name: str, total: int, unit: str = "questions", *, done: int) -> None:
        """The benchmark `name`, of whose `total` questions some are `done` already, is asked."""
        self._began, self._tokens = time.monotonic(), 0
        super().begin(name, total, unit, done=done)

    def answered(self, done: int, *, avg: float, tokens: int) -> None:
        """`done` questions are answered, with `avg` so far; `tokens` more were sampled."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self.at(done, f"avg {avg:.3f}  {rate:.0f} tok/s")
