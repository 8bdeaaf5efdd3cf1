"""What is this process doing, and is it getting on? Told by whoever works, read by the heartbeat.

A process is one rank and does one thing at a time, so this is one variable and no object to hand
through every call. Ranks run the same phases in the same order: the number of phases begun says
which of two ranks is behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where a rank is: in `phase`, the `number`-th that it began, of `step` (None: of no step)."""

    phase: str
    step: int | None
    number: int
    since: float  # time.monotonic(), seconds


_position = Position("start", None, 0, time.monotonic())
_beats = 0


def enter(phase: str, step: int | None) -> None:
    """`phase` begins here and now."""
    global _position  # noqa: PLW0603
    _position = Position(phase, step, _position.number + 1, time.monotonic())


def beat() -> None:
    """A piece of a long phase is done: a token for a batch of responses, a micro-batch, a grade, a
    weight. Costs a tenth of a microsecond; without it a phase longer than `logging.stall_s` looks
    like a stall.
    """
    global _beats  # noqa: PLW0603
    _beats += 1


def position() -> Position:
    """The phase begun last."""
    return _position


def beats() -> int:
    """The pieces of work done since this process began."""
    return _beats
