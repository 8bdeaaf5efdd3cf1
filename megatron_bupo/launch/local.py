"""The ranks of a layout as processes on this machine, for whoever did not come through torchrun.

Where there is no GPU the ranks are forked from a process that has already imported everything,
which takes a fraction of a second; a process that may touch CUDA must be spawned. Ranks die with
this process, however it dies, so a killed run leaves nothing behind that could go on writing to its
directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1


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


def _rank_main(
    rank: int,
    parent: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends its ranks
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environment["WORLD_SIZE"])))
    function(*args)


def run_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """`function(*args)` on `world_size` ranks: here if one rank or under torchrun, else in new
    processes.

    Returns when all ranks have; the first rank that fails ends the others, and its traceback is
    raised here.
    """
    if world_size == 1 or under_torchrun():
        function(*args)
        return
    import torch
    import torch.distributed as dist
    from torch.multiprocessing import start_processes

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks join this store: no race for a free port
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    context: Any = start_processes(
        _rank_main,
        args=(os.getpid(), environment, function, args),
        nprocs=world_size,
        join=False,
        start_method="spawn" if torch.cuda.is_available() else "fork",
    )
    try:
        while not context.join():
            pass
    except BaseException:
        for process in context.processes:
            process.kill()
        raise
