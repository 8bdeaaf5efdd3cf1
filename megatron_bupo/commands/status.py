"""`megatron-bupo status RUN`: what the scheduler says of a run, and what the run does."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_bupo.checkpoints import whole_checkpoints
from megatron_bupo.config import expand
from megatron_bupo.durable import whole_lines
from megatron_bupo.launch import jobs, record
from megatron_bupo.record.metrics import FILE


def run(args: Namespace) -> None:
    """Print it."""
    run_dir = Path(expand(args.run_dir))
    launched = record.read(run_dir)
    jobs.bring(launched, run_dir)
    where = f"{launched.nodes} x {launched.processes_per_node} ranks"
    if launched.server_nodes:
        where += f", servers on {launched.server_nodes} more"
    print(f"job         {launched.job} ({launched.kind}), {where}, launched {launched.at}")
    print(f"recipe      {' '.join([launched.recipe, *launched.overrides])}")
    print(f"code        {launched.code}")
    print(f"state       {_state(launched, run_dir)}")
    for line in _progress(run_dir):
        print(line)


def _state(launched: record.Launched, run_dir: Path) -> str:
    state = jobs.state(launched, run_dir)
    if state == jobs.OVER and (code := jobs.exit_code(run_dir)) is not None:
        return f"{state}, with exit code {code}"
    return state


def _progress(run_dir: Path) -> Iterator[str]:
    """How far it has come, by what it has written."""
    if steps := whole_lines(run_dir / FILE):
        try:
            last = json.loads(steps[-1])
            took = f"{last.get('time/step_s', 0):.1f} s the last"
            yield f"steps       {last['step'] + 1} done, {took}"
        except (ValueError, LookupError, TypeError, AttributeError):
            yield f"steps       the last line of {run_dir / FILE} is damaged"
    if checkpoints := whole_checkpoints(run_dir):
        yield f"checkpoint  {checkpoints[-1][1]}"
    ranks = len(list((run_dir / "ranks").glob("rank-*.json")))
    if ranks:
        yield f"ranks       {ranks} have written where they stand, to {run_dir / 'ranks'}"
