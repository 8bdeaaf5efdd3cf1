"""The ranks of a layout as processes on this machine, for whoever did not come through torchrun.

Where there is no GPU the ranks are forked from a process that has already imported everything,
which takes a fraction of a second; a process that may touch CUDA must be spawned. Ranks die with
this process, however it dies, so a killed run leaves nothing behind that could go on writing to its
directory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, NoReturn

from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.stopping import SIGNALS

PR_SET_PDEATHSIG = 1
HOST = "127.0.0.1"


class RankFailed(RuntimeError):
    """A rank raised or died. `str(error)` is its traceback, or how it died, perhaps `by` a
    signal.
    """

    by: int | None = None


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere a clean exit
    must do).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)


def under_torchrun() -> bool:
    """Did a launcher already make this process one rank of several?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Is this process the one that acts for the whole run: a launcher, or torchrun's rank 0?"""
    return not under_torchrun() or os.environ["RANK"] == "0"


def run_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """`function(*args)` on `world_size` ranks: here if one rank or under torchrun, else in new
    processes.

    Returns when all ranks have, and leaves none behind.

    Raises:
        InputError, RunStopped: as the rank raised it.
        RankFailed: another error of a rank, of the first that failed: it ends the others.
        KeyboardInterrupt, Terminated: this process was told to stop. SIGTERM goes to ranks first:
            those that train stop where it is safe; a second one ends them.
    """
    if under_torchrun():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # but killed itself leaves them behind
            die_with_parent(os.getppid())
        function(*args)
        return
    with _terminable():
        if world_size == 1:
            function(*args)
        else:
            _run_local(function, world_size, args)


def _run_local(function: Callable[..., None], world_size: int, args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks join this store: no race for a free port
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes: dict[Connection, Any] = {}
    try:
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(os.getpid(), {**environment, **own}, theirs, function, args),
                name=f"rank {rank}",
            )
            process.start()
            theirs.close()  # the rank has the only one: its end, however it comes, ends the pipe
            processes[ours] = process
        # Now, not before: it runs a thread, and a fork beside a thread that holds a lock is a rank
        # that waits for that lock for ever. Ranks that were faster wait in the socket's queue.
        _store = dist.TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        with _handed_on(list(processes.values())):
            _wait_for(processes)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _wait_for(processes: Mapping[Connection, Any]) -> None:
    """Return when all ranks have ended well; raise what the first to fail has to say."""
    running: dict[Any, Any] = dict(processes)
    while running:
        # The dead come first: what the others complain of is that they are gone.
        for pipe in sorted(wait(list(running)), key=lambda pipe: running[pipe].is_alive()):
            failure = _failure(pipe, running.pop(pipe))
            if failure is not None:
                raise failure


def _failure(pipe: Any, process: Any) -> Exception | None:
    """What the rank had to say, or how it died without a word; None if it ended well."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
    code = process.exitcode
    if code == 0:
        return None
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    failure = RankFailed(f"{process.name} {how}")
    failure.by = -code if code < 0 else None
    return failure


def _rank_main(
    parent: int,
    environment: dict[str, str],
    failures: Connection,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends its ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environment["WORLD_SIZE"])))
    try:
        function(*args)
    except BaseException as error:
        text = f"rank {environment['RANK']} failed:\n{traceback.format_exc().rstrip()}"
        tells = isinstance(error, (InputError, RunStopped))
        failures.send(error if tells else RankFailed(text))
        # Leaving would break the connections of the other ranks, whose errors say less: wait for
        # the parent to end us.
        while True:
            signal.pause()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside the block."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _handed_on(ranks: Sequence[Any]) -> Iterator[None]:
    """The first signal of `stopping.SIGNALS` goes to the `ranks`; then as ever."""
    asked: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise Terminated
        asked.append(number)
        for rank in ranks:
            if rank.is_alive():
                os.kill(rank.pid, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    except RankFailed as failure:
        if failure.by in asked:  # it did not train, and so had nothing to save
            raise Terminated from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
