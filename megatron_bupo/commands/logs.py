"""`megatron-bupo logs RUN`: what its ranks and servers have said."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.durable import lines_since
from megatron_bupo.errors import InputError
from megatron_bupo.launch import jobs, record
from megatron_bupo.launch.logs import Log, logs_of

LOOK_S = 1.0
ASK_S = 5.0  # between two questions to the scheduler


def run(args: Namespace) -> None:
    """Show the end of each log, and with `--follow` what is added."""
    run_dir = Path(expand(args.run_dir))
    launched = record.read(run_dir)
    if args.follow:
        follow(launched, run_dir, rank=args.rank, lines=args.lines)
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
            asked, over = time.monotonic(), jobs.is_over(jobs.state(launched, run_dir))
        time.sleep(0 if over else LOOK_S)  # what it said last is read once more


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
