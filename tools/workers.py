"""Processes that each hold one variant of a computation and work when asked to, so that variants
can take turns and whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class Worker:
    """A forked process that lives `life(connection, *args)`, until the block ends."""

    def __init__(self, life: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=life, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()

    def ask(self, what: object) -> Any:
        """Its answer to `what`."""
        self._connection.send(what)
        return self.hear()

    def hear(self) -> Any:
        """What it says of its own accord."""
        return self._connection.recv()
