"""The process that runs reward functions, so that one which hangs or crashes takes nothing with it.

It speaks over one socket: in come the function's name and its time limit, out go the `Arguments`
the function wants; then in comes a list of calls, and out goes a `Grade` per call as soon as it is
known. So what was graded before a crash is never lost, and the grade that the parent waits for is
the one to blame.

A function that hangs in Python is interrupted here, by a timer signal. One that hangs in C does not
come back to Python to see the signal; then the parent kills this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, SupportsFloat

from megatron_bupo.errors import InputError
from megatron_bupo.rewards.functions import arguments_of, resolve
from megatron_bupo.types import Grade

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LONGEST_VALUE = 120  # characters of a foreign message that a warning repeats


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
    name, timeout_s = connection.recv()
    try:
        function = resolve(name)
        connection.send(arguments_of(function, name))
    except InputError as error:
        connection.send(str(error))
        return
    while True:
        for args, kwargs in connection.recv():
            connection.send(_grade(function, args, kwargs, timeout_s=timeout_s))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process with its parent, however that dies, whatever we do then."""
    if sys.platform == "linux":  # whose parent is a thread: when that ends, the grader replaces us
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _raise_time_up(_signal: int, _frame: FrameType | None) -> None:
    raise _TimeUp


def _grade(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, timeout_s: float
) -> Grade:
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            value = function(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp:
        return Grade(0.0, f"reward function took longer than {timeout_s:g} s")
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
