"""The process that runs reward functions, so that one which hangs or crashes takes nothing with it.

It speaks over one socket: in come the terms and the limits, out go the `Arguments` that each
function wants; then in comes a list of calls, and out goes a `Grade` per call as soon as it is
known. So what was graded before a crash is never lost, and the grade that the parent waits for is
the one to blame.

A function that hangs in Python is interrupted here, by a timer signal. One that hangs in C does not
come back to Python to see the signal; then the parent kills this process. One that asks for more
memory than it may have gets a MemoryError. What functions keep counts as well: before a call that
would begin with less than half of the memory, this process asks to be replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, SupportsFloat

from megatron_bupo.errors import InputError
from megatron_bupo.rewards.terms import load
from megatron_bupo.types import Grade

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LONGEST_VALUE = 120  # characters of a foreign message that a warning repeats


@dataclass(frozen=True)
class Limits:
    """What a call may take, and what functions may ask for as an option."""

    timeout_s: float
    memory_mb: int | None  # beyond what the process has when all is imported; None: any
    max_response_tokens: int | None


class _TimeUp(BaseException):
    """Not an Exception: `except Exception` in a reward function must not swallow it."""


def main(descriptor: int, parent: int) -> None:
    """Serve the process `parent` over the socket `descriptor` until it hangs up."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, _raise_time_up)
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        _serve(connection)


def _serve(connection: Connection) -> None:
    terms, limits = connection.recv()
    try:
        functions = [load(term, limits.max_response_tokens) for term in terms]
    except InputError as error:
        connection.send(error.args)
        return
    memory = _Memory(limits.memory_mb)
    connection.send([function.arguments for function in functions])
    while True:
        for term, args, keywords in connection.recv():
            if memory.is_half_used():
                connection.send(None)
                return
            function = functions[term]
            connection.send(_grade(function.call, args, keywords | function.options, limits))


class _Memory:
    """A limit on the memory that this process takes from now on."""

    def __init__(self, limit_mb: int | None) -> None:
        self._limit = None if limit_mb is None else limit_mb << 20
        self._start = _data_bytes()
        if self._limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            wanted = self._start + self._limit
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def is_half_used(self) -> bool:
        return self._limit is not None and 2 * (_data_bytes() - self._start) > self._limit


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, and a stack."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    except OSError:  # no Linux
        return 0
    return pages * resource.getpagesize()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process with its parent, however that dies, whatever we do then."""
    if sys.platform == "linux":  # whose parent is a thread: when that ends, the grader replaces us
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _raise_time_up(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUp


def _grade(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], limits: Limits
) -> Grade:
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
            value = function(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp:
        return Grade(0.0, f"reward function took longer than {limits.timeout_s:g} s")
    except MemoryError:
        limit = "there is" if limits.memory_mb is None else f"{limits.memory_mb} MB"
        return Grade(0.0, f"reward function needed more memory than {limit}")
    except BaseException as error:  # sys.exit() included
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
        return Grade(
            0.0, f"reward function raised {type(error).__name__}: {_short(error)} ({where})"
        )
    if not isinstance(value, SupportsFloat):
        kind = type(value).__name__
        return Grade(0.0, f"reward function returned {_short(repr(value))}, a {kind}, not a number")
    reward = float(value)
    if not math.isfinite(reward):
        return Grade(0.0, f"reward function returned {reward}")
    return Grade(reward)


def _short(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= _LONGEST_VALUE else f"{line[:_LONGEST_VALUE]}..."
