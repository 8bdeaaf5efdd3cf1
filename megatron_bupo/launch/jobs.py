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
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.launch.folder import cancelled_file, launch_dir, node_file
from megatron_bupo.launch.record import Launched

OVER = "over"
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
ENDED = ("COMPLETED", "COMPLETING", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL",
         "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")  # fmt: skip


def state(launched: Launched, run_dir: Path) -> str:
    """The scheduler's word for it, e.g. `RUNNING`, with what it adds; `over`: it knows it no
    more.
    """
    if launched.kind == "slurm":
        line = _asked(launched, "squeue", "-h", "-j", launched.job, "-o", "%T|%R|%M", quiet=True)
        if not line:
            return OVER
        word, why, ran = line.splitlines()[0].split("|")
        return f"{word} ({why}, {ran})" if word in PENDING else f"{word} on {why}, for {ran}"
    if launched.kind == "local":
        return "RUNNING" if _process(run_dir) else OVER
    statuses = _experiment(launched, run_dir).status(return_dict=True) or {}
    return ", ".join(str(status.get("status")) for status in statuses.values()) or OVER


def is_over(state: str) -> bool:
    """Will nothing come of it any more?"""
    return state == OVER or state.startswith(ENDED)


def cancel(launched: Launched, run_dir: Path, *, now: bool) -> str:
    """End it, for good; unless `now` it may first save what it has learned. What was done."""
    present = state(launched, run_dir)
    if is_over(present):
        return f"job {launched.job} is {present} already"
    cancelled_file(run_dir).parent.mkdir(parents=True, exist_ok=True)
    cancelled_file(run_dir).touch()
    if launched.kind == "slurm":
        gently = not now and present.startswith("RUNNING")
        words = ["scancel", *(["--signal=USR2"] if gently else []), launched.job]
        _asked(launched, *words)
        return "asked to save and end" if gently else "cancelled"
    if launched.kind == "local" and (pid := _process(run_dir)):
        os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
        return "killed" if now else "asked to save and end"
    experiment = _experiment(launched, run_dir)
    for job in experiment.jobs:
        experiment.cancel(job.id)
    return "cancelled"


def _asked(launched: Launched, *words: str, quiet: bool = False) -> str:
    """What a command of the scheduler's says."""
    command = list(words)
    if launched.ssh is not None:
        command = ["ssh", launched.ssh, shlex.join(words)]
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


def exit_code(run_dir: Path) -> int | None:
    """Of the first node's last start; None: it has not ended by itself."""
    return _node(run_dir).get("code")


def _process(run_dir: Path) -> int | None:
    """The process of the only node of a local launch, if it is alive."""
    pid = _node(run_dir).get("pid")
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return pid if b"megatron_bupo" in words and ") Z " not in status else None


def _node(run_dir: Path) -> dict[str, int | None]:
    try:
        return json.loads(node_file(run_dir).read_text())
    except (OSError, ValueError):
        return {}


def _experiment(launched: Launched, run_dir: Path) -> Any:
    os.environ["NEMORUN_HOME"] = str(launch_dir(run_dir))
    try:
        from nemo_run import Experiment

        return Experiment.from_id(launched.experiment)
    except Exception as error:
        reason = f"NeMo-Run does not find it ({type(error).__name__}: {error})"
        raise InputError(launched.experiment, reason, "ask the scheduler") from None
