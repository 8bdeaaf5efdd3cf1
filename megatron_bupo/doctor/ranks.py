"""Do ranks reach each other?

Under torchrun the ranks are its own; alone, two are forked. They meet at torchrun's store, each
says where it can be reached and connects to every other, within a timeout for each, so that who
cannot be reached from where is told by name. Then they add up numbers, over gloo and, with GPUs,
over NCCL.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding
from megatron_bupo.launch.local import RankFailed, run_ranks, under_torchrun

AREA = "ranks"
APART_S = 5.0  # clocks of ranks
NETWORK = (
    "check routes and firewalls; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose an interface"
)


def ranks(timeout_s: float) -> Iterator[Finding]:
    """What ranks find when they meet; under torchrun nothing on any but the first."""
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


def _meet(out: Path, timeout_s: float) -> None:
    """On each rank; the first one writes what all have found to `out`."""
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: list[list[str]] = []
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        if rank == 0:
            out.write_text(json.dumps([[PROBLEM, f"no store to meet at: {error}", NETWORK]]))
        return
    store = dist.PrefixStore("doctor", store)
    store.set_timeout(limit)
    with socket.create_server(("", 0)) as listener:
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        place = {"host": socket.gethostname(), "address": _address()}
        place["port"] = listener.getsockname()[1]
        store.set(f"place {rank}", json.dumps(place))
        places = _places(store, world)
        store.set(f"clock {rank}", str(time.time()))  # all are here: these are of one moment
        found += _reach(rank, places, timeout_s)
        store.set(f"found {rank}", json.dumps(found))
        others = [_of(store, f"found {r}") or [] for r in range(world) if r != rank]
    missing = [r for r in range(world) if r not in places]
    reachable = not missing and not any((found, *others))
    told = [entry for entries in others for entry in entries] + found
    told += [[PROBLEM, f"rank {r} of {world} did not come", "see its log"] for r in missing]
    if reachable:
        hosts = len({p["host"] for p in places.values()})
        where = "one machine" if hosts == 1 else f"{hosts} machines"
        told.append([OK, f"{world} ranks on {where} reach each other", ""])
        told += _clocks([_of(store, f"clock {r}") for r in range(world)])
        told += _added_up(store, rank, world, limit)
    if rank == 0:
        out.write_text(json.dumps(told))
        store.set("told", "all")
    else:
        _of(store, "told")  # the store is the first rank's: it leaves last


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


def _places(store: Any, world: int) -> dict[int, dict[str, Any]]:
    """Where each rank is that came in time."""
    found = {rank: _of(store, f"place {rank}") for rank in range(world)}
    return {rank: place for rank, place in found.items() if place is not None}


def _of(store: Any, key: str) -> Any:
    """What another rank has said, if it does in time."""
    try:
        return json.loads(store.get(key))
    except (RuntimeError, ValueError):  # torch's timeouts are both
        return None


def _reach(rank: int, places: dict[int, dict[str, Any]], timeout_s: float) -> list[list[str]]:
    """Whom this rank cannot connect to."""
    found = []
    for other, place in places.items():
        address = place["address"], place["port"]
        try:
            socket.create_connection(address, timeout=timeout_s).close()
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
            found.append([PROBLEM, reason, way_out])
    return found


def _clocks(clocks: Sequence[float | None]) -> list[list[str]]:
    """Are they set alike?"""
    told = [clock for clock in clocks if clock is not None]
    apart = max(told) - min(told)
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
