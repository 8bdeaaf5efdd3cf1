"""How are responses graded without a reward function being able to stop the run?

Each rank grades its share in one process of its own (`worker.py`), and the grades are gathered. The
process is started by `subprocess`, not by `multiprocessing`: nothing is forked off a trainer that
holds CUDA and gloo threads, no user's main module is imported again, and no torch at all, so that a
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
from itertools import islice
from multiprocessing.connection import Connection
from typing import Protocol

from megatron_bupo import collective, progress
from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.functions import Arguments, absolute
from megatron_bupo.types import Grade, Rollout, RolloutGroup

_GRACE_S = 0.5  # what the worker has beyond the time limit to interrupt a function by itself
_IMPORT_S = 120.0  # for the reward function's imports
_CLOSE_S = 1.0  # for the worker to end by itself
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; from megatron_bupo.rewards.worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Grading(Protocol):
    """Where grades come from."""

    def grade(self, groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
        """A grade per rollout, in the shape of `groups`, the same on every rank. Collective."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class Grader:
    """Grades rollouts by `reward.function`, in a process that starts at once and ends with ours."""

    def __init__(self, reward: RewardConfig) -> None:
        self._name = absolute(reward.function)  # a later chdir must not matter
        self._timeout_s = reward.timeout_s
        self._process = _Process(self._name, self._timeout_s)

    def grade(self, groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
        """A grade per rollout, in the shape of `groups`, the same on every rank. Collective."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        grades = iter(collective.gather(self._grade(collective.share(rollouts))))
        return [list(islice(grades, len(group.rollouts))) for group in groups]

    def close(self) -> None:
        """End the grading process."""
        self._process.close()

    def _grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        grades: list[Grade] = []
        while len(grades) < len(rollouts):
            if not self._process.is_alive():
                self._process.close()
                self._process = _Process(self._name, self._timeout_s)
            grades += self._process.grade(rollouts[len(grades) :])
        return grades


class _Process:
    """The grading process, seen from the trainer."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._arguments: Arguments | None = None  # known when the process is ready
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
            self._connection.send((name, timeout_s))

    def is_alive(self) -> bool:
        return self._process.poll() is None and not self._connection.closed

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """The grades of all `rollouts`, or up to the one that the process did not survive."""
        arguments = self._ready()
        calls = [arguments.of(rollout) for rollout in rollouts]
        grades: list[Grade] = []
        try:
            self._connection.send(calls)
            for _ in calls:
                if not self._connection.poll(self._timeout_s + _GRACE_S):
                    limit = f"{self._timeout_s:g} s"
                    self._kill()
                    return [
                        *grades,
                        Grade(0.0, f"reward function took longer than {limit} and was killed"),
                    ]
                grades.append(self._connection.recv())
                progress.beat()
        except (EOFError, OSError):
            grades.append(Grade(0.0, f"reward function ended its process with {self._kill()}"))
        return grades

    def close(self) -> None:
        self._connection.close()  # an idle worker ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_S)
        self._kill()

    def _ready(self) -> Arguments:
        """Wait until the process has imported the function."""
        if self._arguments is not None:
            return self._arguments
        key = f"reward.function={self._name}"
        try:
            late = f"{key}: does not import within {_IMPORT_S:g} s"
            reply = self._connection.recv() if self._connection.poll(_IMPORT_S) else late
        except (EOFError, OSError):
            reply = f"{key}: importing it ends the process with {self._kill()}"
        if isinstance(reply, str):  # the message of an InputError
            self._kill()
            raise InputError(*reply.split(": ", 1))
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
