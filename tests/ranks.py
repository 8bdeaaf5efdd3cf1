"""A function on every rank of a gloo group, from inside a test: no torchrun, ports or orphans.

Workers are forked, so they start within milliseconds and hold all that the test has imported and
built. They meet through a file, answer through a pipe each, and are killed, with whatever they
started, before `run_ranks` returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankError(Exception):
    """A rank raised or died; the message carries its traceback."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """`fn(*args)` on each of `world` gloo ranks; what each returned, in order of rank.

    The first rank that fails decides: its traceback is raised here as RankError, and the others,
    which may wait for it in a collective, are killed. Results are pickled: return CPU tensors,
    numbers, or containers of them.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        readers: list[Connection] = []
        workers: list[Any] = []
        try:
            for rank in range(world):
                reader, writer = context.Pipe(duplex=False)
                worker = context.Process(target=_work, args=(rank, world, store, writer, fn, args))
                worker.start()
                writer.close()  # the worker's copy is now the only one: its death reads as the end
                readers.append(reader)
                workers.append(worker)
            return _answers(readers, time.monotonic() + timeout_s)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):  # not yet a session of its own
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.kill()
                worker.join()


def _answers(readers: list[Connection], deadline: float) -> list[Any]:
    """Each rank's result; RankError as soon as one fails, TimeoutError at the deadline."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        late = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(late), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(late.values())} did not answer in time")
        for reader, rank in late.items():
            if reader not in ready:
                continue
            try:
                failed, answer = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without an answer") from None
            if failed:
                raise RankError(f"rank {rank} failed:\n{answer}")
            results[rank] = answer
    return [results[rank] for rank in range(len(readers))]


def _work(
    rank: int,
    world: int,
    store: Path,
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """One worker: join the group, run, answer, and wait for the end."""
    gc.freeze()  # else its collector walks through, and so copies, all that the parent holds
    os.setsid()  # so that one killpg reaches what the worker starts
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # pytest killed: die with it
    torch.set_num_threads(1)  # the parent's OpenMP threads did not survive the fork
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=180),
        )
        # Pickled by value: multiprocessing would pass tensors as shared memory, which dies with us.
        answer = pickle.dumps((False, fn(*args)))
    except BaseException:
        answer = pickle.dumps((True, traceback.format_exc()))
    writer.send_bytes(answer)
    # Leaving now would break the connections of the other ranks, and their errors could be
    # reported before the one that caused them.
    signal.pause()
