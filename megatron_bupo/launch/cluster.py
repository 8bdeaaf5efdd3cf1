"""Where does a run go? A cluster is a small YAML file: what kind it is, how much a node holds, and
the native options of NeMo-Run's executor for that kind, under their own names.

`--on NAME` is `conf/clusters/NAME.yaml` beside the recipes or the path of such a file.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError
from megatron_bupo.launch import secrets

KINDS = ("local", "slurm", "skypilot", "lepton", "kubernetes")
SHARED = ("local", "slurm")  # where a shared file system is usual
_SLURM_ONLY = ("time", "requeues")  # NeMo-Run tells others neither
_SHIPPED = Path(__file__).parents[2] / "conf" / "clusters"
_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d\d){0,2}")
_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True)
class Cluster:
    """What `conf/clusters/*.yaml` says."""

    kind: str = "???"  # local | slurm | skypilot | lepton | kubernetes
    gpus_per_node: int = 8  # 0: none, and no GPU is asked for
    processes_per_node: int | None = None  # ranks of the trainer; None: one for each GPU
    server_nodes: int = 0  # nodes for SGLang servers only, beside those of the trainer
    time: str = "04:00:00"  # limit of one start of a job, as Slurm writes it
    grace_s: int = 120  # before that limit, and after SIGTERM, for a step to end and be saved
    requeues: int = 50  # starts after the first of a job that is preempted
    # tree: this working tree, with what is not committed | a requirement such as
    # "megatron-bupo==1.0": installed on every node before it starts | installed: what is there
    code: str = "tree"
    python: str | None = None  # on the nodes; None: that of whoever launches, in images `python`
    port: int = 29500  # on the trainer's first node, where its ranks meet
    env: dict[str, str] = field(default_factory=dict)
    executor: dict[str, Any] = field(default_factory=dict)  # native options, see NeMo-Run
    # Slurm from outside: host, user, and perhaps port and identity (a key file)
    ssh: dict[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Ranks of the trainer on a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def in_place(self) -> bool:
        """Do its nodes see the files that whoever launches sees?"""
        return self.kind in SHARED and not self.ssh

    @property
    def interpreter(self) -> str:
        """What runs Python on the nodes."""
        own = self.in_place and self.executor.get("container_image") is None
        return self.python or (sys.executable if own else "python")


def load_cluster(name: str) -> Cluster:
    """The cluster that the file `name`, or `conf/clusters/NAME.yaml`, describes.

    Raises:
        InputError: there is none, or something in it is wrong.
    """
    path = find(name)
    found = _read(path)
    known = {f.name for f in fields(Cluster)}
    for key in found:
        if key not in known:
            raise InputError(f"{key} ({path})", "unknown key", nearest(key, known))
        if key in _SLURM_ONLY and found.get("kind") in KINDS and found["kind"] != "slurm":
            reason = f"says nothing to kind={found['kind']}"
            raise InputError(f"{key}={found[key]} ({path})", reason, "remove it")
    merged = OmegaConf.structured(Cluster)
    OmegaConf.set_readonly(merged, False)
    for key, value in found.items():
        try:
            merged[key] = _as_text(value) if key in {"env", "time"} else value
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{key}={value} ({path})", reason, "correct it") from None
    if OmegaConf.is_missing(merged, "kind"):
        raise InputError(f"kind ({path})", "has no value", f"choose from {', '.join(KINDS)}")
    secrets.refuse_in_env(found.get("env") or {}, path, inherited=merged.kind in SHARED)
    try:
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # `${oc.env:NAME}` of a name that is not set
        where = f"{error.full_key} ({path})"
        raise InputError(where, str(error).partition("\n")[0], "export it") from None
    assert isinstance(cluster, Cluster)
    _check(cluster, path)
    return cluster


def _as_text(value: Any) -> Any:
    """Numbers and truth values as a YAML file has them, for settings that are text."""
    if isinstance(value, dict):
        return {str(name): _as_text(each) for name, each in value.items()}
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def find(name: str) -> Path:
    """The file that `--on NAME` means."""
    candidates = [Path("conf/clusters") / f"{name}.yaml", _SHIPPED / f"{name}.yaml"]
    if name.endswith((".yaml", ".yml")):
        candidates = [Path(expand(name))]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({p.stem for c in candidates for p in c.parent.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    way_out = f"the nearest is {near[0]}" if near else f"choose from {', '.join(known)}, or a file"
    raise InputError(f"--on {name}", f"there is no {candidates[0]}", way_out)


def _read(path: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(str(path), reason, "correct it") from None
    if not isinstance(found, dict):
        raise InputError(str(path), "is not a mapping of settings", "see conf/clusters")
    return found


def nearest(key: object, known: Mapping[str, Any] | set[str]) -> str:
    """The way out of an unknown `key`."""
    near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0)
    return f"the nearest key is {near[0]}"


def _check(cluster: Cluster, path: Path) -> None:
    least = {"gpus_per_node": 0, "server_nodes": 0, "requeues": 0, "grace_s": 0, "port": 1}
    for key, bound in {**least, "processes_per_node": 1}.items():
        value = getattr(cluster, key)
        if value is not None and value < bound:
            raise _wrong(cluster, key, path, f"is less than {bound}", "choose more")
    if cluster.port >= 2**16:
        raise _wrong(cluster, "port", path, "is no port", f"choose up to {2**16 - 1}")
    if cluster.kind not in KINDS:
        way_out = f"choose from {', '.join(KINDS)}"
        raise _wrong(cluster, "kind", path, "is no kind of cluster", way_out)
    if not _TIME.fullmatch(cluster.time):
        way_out = "write hours:minutes:seconds, quoted"
        raise _wrong(cluster, "time", path, "is not a time as Slurm writes it", way_out)
    for name in cluster.env:
        if not _ENV_NAME.fullmatch(name):  # NeMo-Run would export it in capitals
            reason = "NeMo-Run writes names of environment variables in capitals"
            raise InputError(f"env.{name} ({path})", reason, f"write {name.upper()}")
    if cluster.ssh:
        _check_ssh(cluster, path)
    if cluster.server_nodes and cluster.kind != "slurm":
        reason = "servers on nodes of their own need Slurm"
        way_out = "set it to 0, or name servers in servers.addresses"
        raise _wrong(cluster, "server_nodes", path, reason, way_out)


def _check_ssh(cluster: Cluster, path: Path) -> None:
    if cluster.kind != "slurm":
        raise InputError(f"ssh ({path})", f"says nothing to kind={cluster.kind}", "remove it")
    known = {"host", "user", "port", "identity"}
    if "job_dir" in cluster.ssh:
        raise InputError(f"ssh.job_dir ({path})", "all of a job is in its run_dir", "remove it")
    for key in sorted(cluster.ssh.keys() - known):
        raise InputError(f"ssh.{key} ({path})", "unknown key", nearest(key, known))
    for key in ("host", "user"):
        if not cluster.ssh.get(key):
            raise InputError(f"ssh.{key} ({path})", "has no value", "set it")
    if not cluster.ssh.get("port", "22").isdecimal():
        where = f"ssh.port={cluster.ssh['port']} ({path})"
        raise InputError(where, "is not a number", "correct it")


def _wrong(cluster: Cluster, key: str, path: Path, reason: str, way_out: str) -> InputError:
    return InputError(f"{key}={getattr(cluster, key)} ({path})", reason, way_out)
