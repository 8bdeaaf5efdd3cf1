"""Shall this run stop here? Who takes its machines away says so by a signal, minutes before.

A signal reaches ranks at different moments, or only those of one node, so a rank merely notes it.
At places where all are together anyway they vote (`vote`), and all stop there or none: before a
step, and while it samples, which is most of it and changes nothing. A step whose updates have begun
is finished first. What has been learned is then saved, and the same command goes on from there to
the same numbers.

A run that nobody gives the time is killed, and goes on from its last checkpoint instead.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_bupo.errors import Preempted

# Schedulers send SIGTERM; SIGUSR2 is what we have Slurm send ahead of it, because torchrun kills
# its ranks half a minute after the former.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_asked: str | None = None  # by which signal
_allowed = False


@contextmanager
def heeded() -> Iterator[None]:
    """Inside the block a signal asks this rank to stop, and a second one means what it did before
    (unless that was to die: torchrun hands on what the scheduler has sent to all). One that was
    blocked until now, by whoever started this rank, counts.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        global _asked  # noqa: PLW0603
        handler = before[signal.Signals(number)]
        if _asked is not None and callable(handler):
            handler(number, frame)
        _asked = signal.Signals(number).name

    for number in SIGNALS:
        signal.signal(number, note)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)


def hold_back() -> None:
    """For who only starts ranks: be immune to what is meant for them. What is started inherits that
    until it says otherwise, so a warning that reaches a rank too early waits for it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})


@contextmanager
def allowed() -> Iterator[None]:
    """Nothing that a checkpoint would hold changes in this block: who waits in it may `vote`."""
    global _allowed  # noqa: PLW0603
    _allowed = True
    try:
        yield
    finally:
        _allowed = False


def is_allowed() -> bool:
    """Are we in a block that may be left? The same on every rank."""
    return _allowed


def vote() -> None:
    """Stop here if any rank was asked to. Collective.

    Raises:
        Preempted: on every rank.
    """
    from megatron_bupo import collective  # with torch, which whoever asks to stop need not import

    votes = [name for name in collective.gather([_asked]) if name is not None]
    if votes:
        raise Preempted(f"stopped by {votes[0]}")
