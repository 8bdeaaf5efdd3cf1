"""What a launch leaves in the run directory, and what it is found by.

::

    run_dir/launch/launch.json    what was launched, where, and how it is asked for
    run_dir/launch/experiments/   NeMo-Run's own: the script, its output
    run_dir/launch/node.json      process id of the first node, and its exit code when it has ended
    run_dir/launch/again          there while a preempted run waits to be started again
    run_dir/launch/cancelled      there when it must not be
    run_dir/launch/servers/       addresses of servers that have nodes of their own, start by start
    run_dir/logs/START/node-00001/.../{stdout,stderr}.log    of every rank; START names a start
    run_dir/servers/server-*.log  of every server
"""

from __future__ import annotations

import os
from pathlib import Path

START = "BUPO_START"  # names this start of the job, the same on all its nodes


def launch_dir(run_dir: Path) -> Path:
    """All that is not a log."""
    return run_dir / "launch"


def launch_file(run_dir: Path) -> Path:
    """What was launched."""
    return launch_dir(run_dir) / "launch.json"


def again_file(run_dir: Path) -> Path:
    """There when a preempted run is to be started again."""
    return launch_dir(run_dir) / "again"


def node_file(run_dir: Path) -> Path:
    """How the first node is."""
    return launch_dir(run_dir) / "node.json"


def cancelled_file(run_dir: Path) -> Path:
    """There when it is not to be."""
    return launch_dir(run_dir) / "cancelled"


def start_name() -> str:
    """This start of the job."""
    return os.environ.get(START, "start-0")


def log_dir(run_dir: Path, node: int) -> Path:
    """Logs of the ranks of `node`, of this start."""
    return run_dir / "logs" / start_name() / f"node-{node:05d}"


def address_dir(run_dir: Path) -> Path:
    """Where servers of this start write their addresses, a file each."""
    return launch_dir(run_dir) / "servers" / start_name()
