"""Variants of one computation take turns, each in a process of its own, so that whatever else the
machine does meets all of them alike.
"""

from __future__ import annotations

import ctypes
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from tools.resident import forget_peak, resident_bytes
from tools.workers import Worker

MEASURED = ("s", "cpu_s", "extra_bytes")
WARM_UP = 2  # rounds before those that are timed; memory is the second's
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Turns:
    """A variant's end of the line: `wait` for a round to begin, `stop` the clock, `tell` of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._map_each(True)

    def _map_each(self, each: bool) -> None:
        """Give every tensor a mapping of its own, or share a heap, which is faster but keeps what
        was freed.
        """
        libc = ctypes.CDLL(None)
        # 32 MiB is what glibc's own threshold soon rises to; it trims at twice as much.
        libc.mallopt(M_MMAP_THRESHOLD, 2**16 if each else 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)

    def wait(self) -> None:
        self._map_each(self._connection.recv())
        forget_peak()
        self._resident = resident_bytes()
        self._cpu_s, self._start = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self._s = time.perf_counter() - self._start
        self._cpu_s = time.process_time() - self._cpu_s
        self._extra = resident_bytes(peak=True) - self._resident

    def tell(self, **facts: float) -> None:
        times = {"s": self._s, "cpu_s": self._cpu_s}
        self._connection.send(times | {"extra_bytes": self._extra} | facts)


Variant = Callable[[Turns], None]


def median_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """What one variant told of its rounds, with the memory of the last to map each tensor."""
    medians = {name: median(r[name] for r in rounds[WARM_UP:]) for name in rounds[0]}
    return medians | {"extra_bytes": rounds[WARM_UP - 1]["extra_bytes"]}


def medians_in_turns(
    variants: Mapping[str, Variant], rounds: int, folder: Path
) -> dict[str, dict[str, float]]:
    """What each variant tells: medians over `rounds`, and its memory."""
    told: dict[str, list[dict[str, float]]] = {who: [] for who in variants}
    with ExitStack() as stack:
        workers = {
            who: stack.enter_context(Worker(serve, variant, folder / who))
            for who, variant in variants.items()
        }
        for i in range(WARM_UP + rounds):
            for who, worker in workers.items():
                told[who].append(worker.ask(i < WARM_UP))
    return {who: median_of(found) for who, found in told.items()}


def serve(connection: Connection, variant: Variant, directory: Path) -> None:
    """A worker's life; it is asked for a round, with each tensor mapped by itself or as usual."""
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, for TRL's sake
    directory.mkdir(parents=True)
    os.chdir(directory)
    torch.set_num_threads(1)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        variant(Turns(connection))
