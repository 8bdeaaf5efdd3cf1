"""How is a job that was launched, and how does it end? Asked of whoever runs it: Slurm by its own
commands (its accounting may be off), processes of this machine by their ids, everything else
through NeMo-Run.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.launch import remote
from megatron_bupo.launch.clouds import IN_CONTAINERS
from megatron_bupo.launch.cluster import SHARED
from megatron_bupo.launch.folder import cancelled_file, launch_dir, node_file
from megatron_bupo.launch.record import Launched

OVER = "over"
NODE = "megatron_bupo.launch.node"
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
ENDED = ("COMPLETED", "COMPLETING", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL",
         "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "SUCCEEDED", "STOPPED", "DELETED",
         "ARCHIVED")  # fmt: skip


def state(launched: Launched, run_dir: Path) -> str:
    """The scheduler's word for it, e.g. `RUNNING`, with what it adds; `over`: it knows it no
    more.
    """
    if launched.kind == "slurm":
        line = _asked(launched, "squeue", "-h", "-j", launched.job, "-o", "%T|%R|%M", quiet=True)
        if not line:
            return OVER
        parts = [part.split("|") for part in line.splitlines()]  # of roles with nodes of their own
        word, why, ran = parts[0]
        if word in PENDING:
            return f"{word} ({why}, {ran})"
        return f"{word} on {', '.join(nodes for _, nodes, _ in parts)}, for {ran}"
    if launched.kind == "local":
        return "RUNNING" if _process(run_dir) else OVER
    if launched.kind in IN_CONTAINERS:
        return remote.state(launched.kind, _executor(launched, run_dir), launched.job)
    statuses = _experiment(launched, run_dir).status(return_dict=True) or {}
    return ", ".join(str(status.get("status")) for status in statuses.values()) or OVER


def is_over(state: str) -> bool:
    """Will nothing come of it any more?"""
    return state == OVER or state.startswith(ENDED)


def has_succeeded(state: str) -> bool:
    """Did a job on a cloud do all that it was to do?"""
    return state in {"COMPLETED", "SUCCEEDED"}


def cancel(launched: Launched, run_dir: Path, *, now: bool) -> str:
    """End it, for good; unless `now` it may first save what it has learned. What was done."""
    present = state(launched, run_dir)
    if is_over(present):
        return f"job {launched.job} is {present} already"
    if launched.kind in SHARED:
        never_again = cancelled_file(Path(launched.run_dir))
        _asked(launched, "install", "-D", "/dev/null", str(never_again))
    if launched.kind == "slurm":
        bring(launched, run_dir)
        gently = not now and present.startswith("RUNNING") and node_file(run_dir).exists()
        words = ["scancel", *(["--signal=USR2"] if gently else []), launched.job]
        _asked(launched, *words)
        return "asked to save and end" if gently else "cancelled"
    if launched.kind == "local" and end(run_dir, now=now):
        return "killed" if now else "asked to save and end"
    if launched.kind in IN_CONTAINERS:
        remote.cancel(_executor(launched, run_dir), launched.job)
        return "cancelled"
    experiment = _experiment(launched, run_dir)
    for job in experiment.jobs:
        experiment.cancel(job.id)
    return "cancelled"


def end(run_dir: Path, *, now: bool) -> bool:
    """End the process of a local launch, unless `now` when it has saved; was there one?"""
    pid = _process(run_dir)
    if pid is not None:
        os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
    return pid is not None


def lines(launched: Launched, run_dir: Path, *, last: int | None) -> Iterator[str]:
    """What a run on a cloud, whose files are there, has said: its first node, by the cloud's own
    logs. `last`: so many lines; None: and what it says from now on, until it pauses.
    """
    if launched.kind in IN_CONTAINERS:
        executor = _executor(launched, run_dir)
        yield from remote.lines(launched.kind, executor, launched.job, last=last)
    else:
        experiment = _experiment(launched, run_dir)
        experiment.logs(experiment.jobs[0].id)  # which prints them


def _asked(launched: Launched, *words: str, quiet: bool = False) -> str:
    """What a command of the scheduler's says."""
    command = list(words)
    if launched.ssh:
        command = [*launched.ssh, shlex.join(words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        way_out = "ask on a machine of the cluster that it was launched on"
        raise InputError(words[0], "is not installed here", way_out) from None
    except subprocess.TimeoutExpired:
        raise InputError(shlex.join(command), "did not answer in a minute", "ask again") from None
    if done.returncode and not quiet:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise InputError(shlex.join(command), said, "see the scheduler's own tools")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise InputError(shlex.join(command), done.stderr.strip(), "ask again later")
    return done.stdout.strip()


def bring(launched: Launched, run_dir: Path) -> None:
    """Have here what the run has written on a cluster that was reached by ssh: what it says and how
    far it is, not what it learned.

    Raises:
        InputError: it cannot be reached.
    """
    if not launched.ssh:
        return
    *words, host = launched.ssh
    wanted = [f"--include=/{name}" for name in ("logs/***", "servers/***", "metrics.jsonl")]
    wanted += [f"--include=/{name}" for name in ("launch/", "launch/node.json", "launch/cancelled")]
    wanted += [f"--include={'/launch/experiments' + '/*' * depth}/" for depth in range(4)]
    wanted += ["--include=/launch/experiments/*/*/*/*.out", "--exclude=*"]
    command = ["rsync", "-az", "-s", "--rsh", shlex.join(words), *wanted]
    command += [f"{host}:{launched.run_dir}/", f"{run_dir}/"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except FileNotFoundError:
        raise InputError("rsync", "is not installed here", "install it") from None
    if done.returncode not in {0, 23, 24}:  # those: something is not there yet, or no more
        raise InputError(shlex.join(launched.ssh), done.stderr.strip(), "ask again later")


def exit_code(run_dir: Path) -> int | None:
    """Of the first node's last start; None: it has not ended by itself."""
    return _node(run_dir).get("code")


def _process(run_dir: Path) -> int | None:
    """The process of the only node of a local launch, if it is alive. One that has begun later than
    its id was written down, as after a reboot, is another.
    """
    import psutil

    try:
        process = psutil.Process(_node(run_dir).get("pid") or 0)
        ours = process.create_time() <= node_file(run_dir).stat().st_mtime
        alive = process.status() != psutil.STATUS_ZOMBIE
        return process.pid if ours and alive and NODE in process.cmdline() else None
    except (OSError, psutil.Error):
        return None


def _node(run_dir: Path) -> dict[str, int | None]:
    try:
        found = json.loads(node_file(run_dir).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _executor(launched: Launched, run_dir: Path) -> Any:
    return _experiment(launched, run_dir).jobs[0].executor


def _experiment(launched: Launched, run_dir: Path) -> Any:
    os.environ["NEMORUN_HOME"] = str(launch_dir(run_dir))
    try:
        from nemo_run import Experiment

        return Experiment.from_id(launched.experiment)
    except Exception as error:
        reason = f"NeMo-Run does not find it ({type(error).__name__}: {error})"
        raise InputError(launched.experiment, reason, "ask the scheduler") from None
