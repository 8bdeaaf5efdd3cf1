"""The logs of a run, of every rank and server, wherever in the run directory they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.launch.folder import launch_dir

_NODE = re.compile(r"node-(\d+)")
_ERROR = "error: "  # before an InputError, as a role tells it


@dataclass(frozen=True)
class Log:
    """A file that grows. `rank` None: a server's, or the job's own."""

    path: Path
    name: str  # what it is of
    rank: int | None = None


def logs_of(run_dir: Path, *, processes_per_node: int) -> list[Log]:
    """All that there are, oldest first. A rank has two for each start of the job."""
    found = []
    for path in (run_dir / "logs").glob("*/node-*/*/attempt_*/*/std*.log"):
        local, node = path.parent.name, _NODE.search(str(path.relative_to(run_dir)))
        if local.isdigit() and node is not None:
            rank = int(node[1]) * processes_per_node + int(local)
            found.append(Log(path, f"rank {rank}", rank))
    servers = (run_dir / "servers").glob("*.log")
    found += [Log(path, path.stem.replace("-", " ")) for path in servers]
    for pattern in ("experiments/*/*/*/*.out", "*.log"):
        found += [Log(path, "job") for path in launch_dir(run_dir).glob(pattern)]
    return sorted(found, key=lambda log: (_changed(log.path), str(log.path)))


def last_error(run_dir: Path, experiment: str) -> str | None:
    """What the role that ended a job has said of it last, if it was a mistake of the user's."""
    outputs = launch_dir(run_dir).glob(f"experiments/*/{experiment}/*/log-*.out")
    for path in sorted(outputs, key=_changed, reverse=True):
        for line in reversed(path.read_text(errors="replace").splitlines()):
            if line.startswith(_ERROR):
                return line.removeprefix(_ERROR)
    return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
