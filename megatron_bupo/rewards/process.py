"""A process that runs reward functions, seen from the trainer; `worker.py` is its inside.

It is started by `subprocess`, not by `multiprocessing`: nothing is forked off a trainer that holds
CUDA and gloo threads, no user's main module is imported again, and no torch at all, so that a
restart costs a fraction of a second.

A grade that stays out for longer than the time limit, or a process that ends, costs the rollout in
turn its reward; then a new process goes on with the next one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from megatron_bupo import progress
from megatron_bupo.config.reward_rules import Term
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.functions import Arguments
from megatron_bupo.rewards.worker import Limits
from megatron_bupo.types import Grade, Rollout

_GRACE_S = 0.5  # what the worker has beyond the time limit to interrupt a function by itself
_IMPORT_S = 120.0  # for the reward functions' imports
_CLOSE_S = 1.0  # for the worker to end by itself
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; from megatron_bupo.rewards.worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)


class GradingProcess:
    """Grades by `terms`, one after the other, in a process that is replaced when it must be."""

    def __init__(self, terms: Sequence[Term], limits: Limits) -> None:
        self._terms, self._limits = terms, limits
        self._process = _Process(terms, limits)

    def grade(self, rollouts: Sequence[Rollout]) -> list[list[Grade]]:
        """The grades of each rollout, one per term."""
        count = len(self._terms)
        calls = [(term, rollout) for rollout in rollouts for term in range(count)]
        grades: list[Grade] = []
        while len(grades) < len(calls):
            if not self._process.is_alive():
                self._process.close()
                self._process = _Process(self._terms, self._limits)
            grades += self._process.grade(calls[len(grades) :])
        return [grades[i : i + count] for i in range(0, len(grades), count)]

    def close(self) -> None:
        """End the process."""
        self._process.close()


class _Process:
    """One process, which may end while it grades."""

    def __init__(self, terms: Sequence[Term], limits: Limits) -> None:
        self._terms, self._limits = terms, limits
        self._arguments: list[Arguments] | None = None  # known when the process is ready
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-uc", _BOOT, str(theirs.fileno()), str(os.getpid()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward function prints goes where warnings go
                start_new_session=True,  # out of reach of Ctrl-C, and killable with its descendants
            )
        self._connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it has died already: `_ready` tells how
            self._connection.send((terms, limits))

    def is_alive(self) -> bool:
        return self._process.poll() is None and not self._connection.closed

    def grade(self, calls: Sequence[tuple[int, Rollout]]) -> list[Grade]:
        """The grades of all `calls` (of which term, for which rollout), or up to the one that the
        process did not survive.
        """
        arguments = self._ready()
        grades: list[Grade] = []
        try:
            self._connection.send([(term, *arguments[term].of(rollout)) for term, rollout in calls])
            for _ in calls:
                if not self._connection.poll(self._limits.timeout_s + _GRACE_S):
                    limit = f"{self._limits.timeout_s:g} s"
                    self._kill()
                    return [
                        *grades,
                        Grade(0.0, f"reward function took longer than {limit} and was killed"),
                    ]
                grade = self._connection.recv()
                if grade is None:  # it asks to be replaced
                    self._kill()
                    return grades
                grades.append(grade)
                progress.beat()
        except (EOFError, OSError):
            grades.append(Grade(0.0, f"reward function ended its process with {self._kill()}"))
        return grades

    def close(self) -> None:
        self._connection.close()  # an idle worker ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_S)
        self._kill()

    def _ready(self) -> list[Arguments]:
        """Wait until the process has imported the functions."""
        if self._arguments is not None:
            return self._arguments
        key = ", ".join(term.where for term in self._terms)
        try:
            late = (key, f"does not import within {_IMPORT_S:g} s", "")
            reply = self._connection.recv() if self._connection.poll(_IMPORT_S) else late
        except (EOFError, OSError):
            reply = (key, f"importing it ends the process with {self._kill()}", "")
        if isinstance(reply, tuple):  # what an InputError says
            self._kill()
            raise InputError(*reply)
        self._arguments = reply
        return reply

    def _kill(self) -> str:
        """End the process and what it has started. Says how it ended, by itself or by us."""
        self._connection.close()
        if self._process.returncode is None:  # not reaped yet, so its id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
