"""`megatron-bupo logs RUN`: what its ranks and servers have said."""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.durable import lines_since
from megatron_bupo.errors import InputError
from megatron_bupo.launch import jobs, record
from megatron_bupo.launch.cluster import SHARED
from megatron_bupo.launch.logs import Log, logs_of

LOOK_S = 1.0
ASK_S = 5.0  # between two questions to the scheduler
LAST_WORDS = 50  # lines of a job that was over before anybody listened


def run(args: Namespace) -> None:
    """Show the end of each log, and with `--follow` what is added."""
    run_dir = Path(expand(args.run_dir))
    launched = record.read(run_dir)
    if args.rank is not None and launched.kind not in SHARED:
        reason = f"logs of ranks are on the cloud, below {launched.run_dir}/logs"
        raise InputError(f"--rank {args.rank}", reason, "leave it out, for the first node's")
    jobs.bring(launched, run_dir)
    if args.follow:
        follow(launched, run_dir, rank=args.rank, lines=args.lines)
        return
    if launched.kind not in SHARED:
        for line in jobs.lines(launched, run_dir, last=args.lines):
            print(line)
        return
    found = _chosen(launched, run_dir, args.rank)
    if not found:
        named = "" if args.rank is None else f" of rank {args.rank}"
        world = launched.nodes * launched.processes_per_node
        way_out = f"ranks count from 0 to {world - 1}; has the job started? See `status`"
        raise InputError(args.run_dir, f"there is no log{named}", way_out)
    ends = [(log, _new(log, {})[1][-args.lines :]) for log in found]
    for log, lines in ends:
        _show(log, lines, several=len(found) > 1)
    if not any(lines for _, lines in ends):
        print("nothing was said yet in " + ", ".join(str(log.path) for log in found))


def follow(launched: record.Launched, run_dir: Path, *, rank: int | None, lines: int) -> None:
    """Show the last `lines` of what there is, then what is added, until the job is over."""
    if launched.kind not in SHARED:
        _follow_there(launched, run_dir)
        return
    read: dict[Path, int] = {}
    for log in _chosen(launched, run_dir, rank):
        read[log.path], shown = _new(log, read)
        _show(log, shown[-lines:] if lines else [], several=rank is None)
    asked, over = 0.0, False
    while True:
        for log in _chosen(launched, run_dir, rank):
            read[log.path], added = _new(log, read)
            _show(log, added, several=rank is None)
        if over:
            return
        if time.monotonic() > asked + ASK_S:
            over = jobs.is_over(jobs.state(launched, run_dir))
            jobs.bring(launched, run_dir)
            asked = time.monotonic()
        time.sleep(0 if over else LOOK_S)  # what it said last is read once more


def _follow_there(launched: record.Launched, run_dir: Path) -> None:
    """Show what a job on a cloud is, and what its first node says, until it is over."""
    state, heard = "", False
    while not jobs.is_over(state):
        if (now := jobs.state(launched, run_dir)) != state:
            print(f"job {launched.job}: {now}", flush=True)
        state, last = now, LAST_WORDS if jobs.is_over(now) else None
        if (last and not heard) or state.startswith("RUNNING"):
            with contextlib.suppress(InputError):  # it is not there yet, or no more
                for line in jobs.lines(launched, run_dir, last=last):
                    heard = True
                    print(line, flush=True)
        time.sleep(0 if jobs.is_over(state) else ASK_S)


def _chosen(launched: record.Launched, run_dir: Path, rank: int | None) -> list[Log]:
    found = logs_of(run_dir, processes_per_node=launched.processes_per_node)
    return [log for log in found if rank is None or log.rank == rank]


def _new(log: Log, read: dict[Path, int]) -> tuple[int, list[str]]:
    """How far `log` has been read now, and the whole lines since `read`."""
    end, whole = lines_since(log.path, read.get(log.path, 0))
    text = b"".join(line + b"\n" for line in whole)
    return end, text.decode(errors="replace").splitlines()


def _show(log: Log, lines: list[str], *, several: bool) -> None:
    if lines and several:
        print(f"==> {log.name}: {log.path}")
    for line in lines:
        print(line, flush=True)
