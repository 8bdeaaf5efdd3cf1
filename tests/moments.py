"""When a test acts upon a command: once a state that stays has come, which it waits for, or, where
the command goes on meanwhile, when that is about to do a certain thing. No busy machine is late for
either.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

LIMIT_S = 120  # for a machine that is busy with other things: whoever waits stops at once


def until(holds: Callable[[], Any], *, while_: Callable[[], object] = lambda: True) -> Any:
    """Wait for what `holds()` to be true of, and return that; it is to come while `while_()`."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline, "waited for in vain"
        assert while_() or holds(), "the end came before what was waited for"
        time.sleep(0.005)
    return found


def at_line(number: int, name: str, act: Callable[[], object]) -> Callable[[], None]:
    """`act()` in the process that is about to add line `number`, from 1, to a file whose path ends
    in `name`: to be called before the command begins.
    """
    return lambda: _before(lambda e, args: e == "open" and args[1] == "a", name, number, act)


def at_rename(name: str, act: Callable[[], object]) -> Callable[[], None]:
    """`act()` in the process that is about to give or take away a name whose path ends so."""
    return lambda: _before(lambda e, _: e == "os.rename", name, 1, act)


def kill_launcher() -> None:
    """SIGKILL to the process whose session this is, and so to us all."""
    os.kill(os.getsid(0), signal.SIGKILL)
    signal.pause()


def _before(
    is_it: Callable[[str, tuple[Any, ...]], bool], name: str, number: int, act: Callable[[], object]
) -> None:
    """`act()` before what happens for the `number`-th time to a path that ends in `name`."""
    times = itertools.count(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        hits = is_it(event, args) and any(str(arg).endswith(name) for arg in args)
        if hits and next(times) == number:
            act()

    sys.addaudithook(hook)  # of this process and those that it forks, for good
