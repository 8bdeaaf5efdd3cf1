"""Do ranks reach each other?

Under torchrun the ranks are its own; alone, two are forked. They meet at torchrun's store, each
says where it can be reached and connects to every other, all at once and within a timeout, so that
who cannot be reached from where is told by name. Where all reach all, as the first rank sees it,
they add up numbers, over gloo and, with GPUs, over NCCL.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding
from megatron_bupo.errors import InputError
from megatron_bupo.launch.local import RankFailed, run_ranks, under_torchrun

AREA = "ranks"
APART_S = 5.0  # clocks of ranks
AT_ONCE = 64  # connections that are tried
START = "start it there too, and see its log"
NETWORK = (
    "check routes and firewalls; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose an interface"
)


def ranks(timeout_s: float) -> Iterator[Finding]:
    """What ranks find when they meet. Under torchrun the first tells what all have found, another
    only why it did not come to where they meet.
    """
    if under_torchrun():
        _check_environment()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "findings.json")
        if not under_torchrun():
            yield Finding(AREA, OK, "not under torchrun: two ranks on this machine")
        try:
            run_ranks(_meet, 2, out, timeout_s)
        except RankFailed as error:
            last = str(error).strip().splitlines()[-1]
            yield Finding(AREA, PROBLEM, f"ranks cannot work together: {last}", NETWORK)
        if out.exists():
            yield from (Finding(AREA, *found) for found in json.loads(out.read_text()))


def _check_environment() -> None:
    """What torchrun tells a rank, or whoever stands in for it."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value, way_out = os.environ.get(name), "start by torchrun, or unset RANK and WORLD_SIZE"
        if not value:
            raise InputError(name, "is not set, and RANK and WORLD_SIZE are", way_out)
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise InputError(f"{name}={value}", "is no number", way_out)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world:
        reason = f"is none of the WORLD_SIZE={world} ranks"
        raise InputError(f"RANK={rank}", reason, f"number them from 0 to {world - 1}")


def _meet(out: Path, timeout_s: float) -> None:
    """On each rank; the first one writes what all have found to `out`."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = _store(rank, timeout_s)
    except dist.DistError as error:
        at = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = f"rank {rank} ({socket.gethostname()}) finds no store at {at}, MASTER_ADDR and "
        reason += f"MASTER_PORT: {str(error).splitlines()[0]}"
        way_out = f"is it the first rank's address, and its port free? {NETWORK}"
        out.write_text(json.dumps([[PROBLEM, reason, way_out]]))
        return
    with socket.create_server(("", 0), backlog=world) as listener:
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        place = {"host": socket.gethostname(), "address": _address()}
        place["port"] = listener.getsockname()[1]
        places = _told(store, "place", place, rank, world, timeout_s=timeout_s)
        clocks = _told(store, "clock", time.time(), rank, world, timeout_s=timeout_s, of=places)
        found = _reach(rank, places, timeout_s)
        # Others may have come, and begun to reach out, later by as much as the limit
        told = _told(store, "found", found, rank, world, timeout_s=2 * timeout_s, of=places)
    entries = [entry for each in told.values() for entry in each]
    missing = [r for r in range(world) if r not in told]
    entries += [[PROBLEM, f"rank {r} of {world} did not come", START] for r in missing]
    if rank == 0:
        store.set("all reach all", json.dumps(not entries))
    verdict = _heard(store, "all reach all", 3 * timeout_s)
    if verdict:
        hosts = len({p["host"] for p in places.values()})
        where = "one machine" if hosts == 1 else f"{hosts} machines"
        entries.append([OK, f"{world} ranks on {where} reach each other", ""])
        entries += _clocks(list(clocks.values()))
        entries += _added_up(store, rank, world, timedelta(seconds=timeout_s))
    if verdict is None:
        entries = [[PROBLEM, f"rank {rank}: the first rank was gone, or is slow", "see its log"]]
    if rank == 0 or verdict is None:
        out.write_text(json.dumps(entries))
    # The store is the first rank's
    _told(store, "ended", True, rank, world, timeout_s=timeout_s, of=told)


def _store(rank: int, timeout_s: float) -> Any:
    """That of torchrun, or one that the first rank opens, as torch itself would; it waits for
    nobody, so that who does not come can be named.
    """
    import torch.distributed as dist

    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agents,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"doctor {attempt}", store)


def _told(
    store: Any,
    what: str,
    own: Any,
    rank: int,
    world: int,
    *,
    timeout_s: float,
    of: Mapping[int, Any] | None = None,
) -> dict[int, Any]:
    """What each rank (`of` those) says that says it in time, which is one limit for all."""
    with contextlib.suppress(RuntimeError):  # the first rank is gone, and its store
        store.set(f"{what} {rank}", json.dumps(own))
    deadline = time.monotonic() + timeout_s
    heard = {
        other: _heard(store, f"{what} {other}", deadline - time.monotonic())
        for other in (range(world) if of is None else of)
    }
    return {other: said for other, said in heard.items() if said is not None}


def _heard(store: Any, key: str, timeout_s: float) -> Any:
    """What a rank has said, or says in time; else None."""
    try:
        store.wait([key], timedelta(seconds=max(timeout_s, 0.01)))
        return json.loads(store.get(key))
    except (RuntimeError, ValueError):  # torch's timeouts are both
        return None


def _accept(listener: socket.socket) -> None:
    """Until it is closed."""
    try:
        while True:
            listener.accept()[0].close()
    except OSError:
        return


def _address() -> str:
    """Where gloo and NCCL would say that this machine is."""
    import psutil

    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for entry in psutil.net_if_addrs().get(name, ()):
        if entry.family == socket.AF_INET:
            return entry.address
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _reach(rank: int, places: Mapping[int, dict[str, Any]], timeout_s: float) -> list[list[str]]:
    """Whom this rank cannot connect to."""

    def reach(other: int) -> list[str] | None:
        place = places[other]
        try:
            socket.create_connection((place["address"], place["port"]), timeout_s).close()
        except OSError as error:
            reason = (
                f"rank {rank} ({socket.gethostname()}) cannot reach rank {other} "
                f"({place['host']}) at {place['address']}: {error}"
            )
            way_out = NETWORK
            if place["address"].startswith("127.") and place["host"] != socket.gethostname():
                way_out = (
                    f"{place['host']} takes its own name for {place['address']}: mend /etc/hosts"
                )
            return [PROBLEM, reason, way_out]
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [found for found in pool.map(reach, places) if found is not None]


def _clocks(clocks: Sequence[float]) -> list[list[str]]:
    """Are they set alike?"""
    apart = max(clocks) - min(clocks)
    if apart <= APART_S:
        return []
    reason = f"clocks of ranks are {apart:.0f} s apart"
    return [[WARNING, reason, "have all machines' clocks set by NTP"]]


def _added_up(store: Any, rank: int, world: int, limit: timedelta) -> list[list[str]]:
    """A small all-reduce over each backend."""
    import torch
    import torch.distributed as dist

    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backends = ["gloo", *(["nccl"] if torch.cuda.is_available() and enough else [])]
    told = []
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else a timeout ends the process
    for backend in backends:
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(backend, store),
                rank=rank,
                world_size=world,
                timeout=limit,
            )
            device = "cpu"
            if backend == "nccl":
                device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            total = torch.full((1024,), float(rank), device=device)
            start = time.perf_counter()
            dist.all_reduce(total)
            right = bool((total == world * (world - 1) / 2).all())
            took = 1000 * (time.perf_counter() - start)
            dist.destroy_process_group()
        except (RuntimeError, ValueError) as error:
            reason = f"{backend}: {str(error).splitlines()[0]}"
            told.append([PROBLEM, reason, NETWORK])
            continue
        said = f"{backend}: an all-reduce of {world} ranks, {took:.1f} ms"
        if right:
            told.append([OK, said, ""])
        else:
            told.append([PROBLEM, f"{said}, gave a wrong sum", "see the network's own diagnosis"])
    return told
