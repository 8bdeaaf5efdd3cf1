"""What was launched, written down: `run_dir/launch/launch.json`, which `status`, `logs` and
`cancel` begin with.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError
from megatron_bupo.launch.folder import cancelled_file, launch_dir, launch_file
from megatron_bupo.launch.nemo import Submitted
from megatron_bupo.launch.placement import Launch, Role, working_tree


@dataclass(frozen=True)
class Launched:
    """A run that was launched."""

    kind: str
    job: str
    experiment: str  # NeMo-Run's name of it
    ssh: list[str]  # words that reach the machine whose Slurm it is; empty: it is this one's
    run_dir: str  # there
    recipe: str
    overrides: list[str]
    nodes: int
    processes_per_node: int
    server_nodes: int
    code: str  # what runs
    at: str  # when

    @staticmethod
    def of(launch: Launch, roles: list[Role], submitted: Submitted) -> Launched:
        """What there is to know of a launch that has been submitted."""
        cluster, trainer = launch.cluster, roles[0]
        return Launched(
            kind=cluster.kind,
            job=submitted.job,
            experiment=submitted.experiment,
            ssh=_reaching(cluster.ssh) if cluster.ssh else [],
            run_dir=str(launch.run_dir),
            recipe=launch.recipe,
            overrides=list(launch.overrides),
            nodes=trainer.nodes,
            processes_per_node=trainer.processes,
            server_nodes=cluster.server_nodes,
            code=code_in_words(cluster.code),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _reaching(ssh: Mapping[str, str]) -> list[str]:
    port = ["-p", ssh["port"]] if "port" in ssh else []
    identity = ["-i", expand(ssh["identity"])] if "identity" in ssh else []
    return ["ssh", *port, *identity, f"{ssh['user']}@{ssh['host']}"]


def write(run_dir: Path, launched: Launched) -> None:
    """Remember it; an earlier launch's cancellation is over."""
    launch_dir(run_dir).mkdir(parents=True, exist_ok=True)
    cancelled_file(run_dir).unlink(missing_ok=True)
    launch_file(run_dir).write_text(json.dumps(asdict(launched), indent=2) + "\n")


def read(run_dir: Path) -> Launched:
    """What was launched into `run_dir`.

    Raises:
        InputError: nothing was, or what is written there cannot be read.
    """
    path = launch_file(run_dir)
    try:
        found = json.loads(path.read_text())
        return Launched(**{field.name: found[field.name] for field in fields(Launched)})
    except OSError:
        reason = "nothing was launched into it" if run_dir.is_dir() else "is no directory"
        way_out = "name the run_dir of a run that `megatron-bupo launch` has started"
        raise InputError(str(run_dir), reason, way_out) from None
    except (ValueError, LookupError, TypeError):
        raise InputError(str(path), "is damaged", "restore it, or ask the scheduler") from None


def code_in_words(code: str) -> str:
    """Which code runs: a requirement, or the working tree with its commit and what is not in it."""
    if code != "tree":
        return "what is installed there" if code == "installed" else code
    tree = working_tree()
    if not (tree / ".git").exists():
        return str(tree)
    commit = _git(tree, "rev-parse", "--short", "HEAD")
    changed = len(_git(tree, "status", "--porcelain").splitlines())
    dirty = f", {changed} files changed since" if changed else ""
    return f"{tree} at {commit}{dirty}"


def _git(tree: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(tree), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
