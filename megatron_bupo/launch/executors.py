"""A cluster's executor in NeMo-Run: its native options, and what we add so that a run is
preempted, requeued and found again.

Slurm: `--signal=USR2@grace` warns ranks before the time limit. A preempted run leaves the file
`again`, and the script that Slurm executes asks to be requeued when it finds it: exit codes do not
survive srun, which kills the slower node with the faster one. The working tree is used in place
where nodes see it, else shipped as it is, with what is not committed.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import InputError
from megatron_bupo.launch.cluster import nearest
from megatron_bupo.launch.folder import START, again_file, cancelled_file, launch_dir
from megatron_bupo.launch.placement import Launch, Role, working_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

THERE = "/nemo_run/code"  # where NeMo-Run unpacks what is shipped
_OURS = {  # option -> what says it
    "nodes": "the recipe's layout, or --nodes",
    "num_nodes": "the recipe's layout, or --nodes",
    "ntasks_per_node": "processes_per_node",
    "nprocs_per_node": "processes_per_node",
    "torchrun_nproc_per_node": "processes_per_node",
    "time": "time",
    "signal": "grace_s",
    "retries": "requeues",
    "env_vars": "env",
    "packager": "code",
    "launcher": "nothing: torchrun is what runs",
    "tunnel": "ssh",
    "heterogeneous": "server_nodes",
    "job_dir": "run_dir",
}


def executor_for(launch: Launch, role: Role, *, several: bool) -> Any:
    """The executor of one role, of `several`."""
    cluster = launch.cluster
    make = {
        "local": _local,
        "slurm": _slurm,
        "skypilot": _skypilot,
        "lepton": _lepton,
        "kubernetes": _kubernetes,
    }[cluster.kind]
    native = dict(cluster.executor)
    for key in native:
        if key in _OURS:
            raise InputError(f"executor.{key}", "is chosen elsewhere", f"see {_OURS[key]}")
    try:
        return make(launch, role, native, several)
    except (AssertionError, ImportError) as error:  # a kind whose package is missing
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"kind={cluster.kind}", reason, "install what it names") from None


def _made(kind: Any, native: Mapping[str, Any], **ours: Any) -> Any:
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for key in native:
        if key not in known:
            where = f"executor.{key}"
            raise InputError(where, f"{kind.__name__} has no such option", nearest(key, known))
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.init
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in {**native, **ours}
    ]
    if missing:
        raise InputError(f"executor.{missing[0]}", f"{kind.__name__} needs it", "set it")
    return kind(**{**ours, **native})


def _local(launch: Launch, role: Role, native: dict[str, Any], several: bool) -> Any:
    from nemo_run import LocalExecutor, Packager

    if role.nodes > 1 or several:
        reason = f"the layout asks for {role.nodes} nodes"
        raise InputError("--on local", reason, "raise gpus_per_node, or launch on a cluster")
    environment = {"PATH": os.environ.get("PATH", ""), **_environment(launch)}  # else none
    return _made(LocalExecutor, native, env_vars=environment, packager=Packager())


def _slurm(launch: Launch, role: Role, native: dict[str, Any], several: bool) -> Any:
    from nemo_run import LocalTunnel, Packager, SlurmExecutor, SSHTunnel

    cluster, ssh = launch.cluster, launch.cluster.ssh
    if ssh:
        tunnel = SSHTunnel(**ssh)
    else:
        tunnel = LocalTunnel(job_dir=str(launch_dir(launch.home) / "experiments"))
    mounts = list(native.pop("container_mounts", []))
    if native.get("container_image") is not None and cluster.in_place:
        seen = dict.fromkeys(map(str, (launch.directory, working_tree(), launch.run_dir)))
        mounts += [f"{path}:{path}" for path in seen]
    # Bash expands these when the job starts; `again` is not looked for by the exit code of srun
    started = {
        START: "slurm-${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}",
        "BUPO_FIRST_NODE": "$head_node_ip",
    }
    own = {"account": None, "job_name_prefix": "bupo-", "gpus_per_node": cluster.gpus_per_node}
    own |= {"wait_time_for_group_job": 0, "monitor_group_job_wait_time": 5}
    own["gpus_per_node"] = cluster.gpus_per_node or None
    lines = [_requeueing(launch), *_installing(launch), native.pop("setup_lines", None) or ""]
    return _made(
        SlurmExecutor,
        {**own, **native},
        nodes=role.nodes,
        ntasks_per_node=1,
        time=cluster.time,
        signal=f"USR2@{cluster.grace_s}" if cluster.grace_s else None,
        heterogeneous=several,
        env_vars={**_quoted(_environment(launch)), **started},
        setup_lines="\n".join(line for line in lines if line),
        container_mounts=mounts,
        tunnel=tunnel,
        packager=Packager() if cluster.in_place else _shipping(launch),
        poll_estimated_start_time=False,
    )


def _skypilot(launch: Launch, role: Role, native: dict[str, Any], _several: bool) -> Any:
    from nemo_run import SkypilotExecutor

    setup = [*_installing(launch), native.pop("setup", None) or ""]
    return _made(
        SkypilotExecutor,
        {"gpus_per_node": launch.cluster.gpus_per_node or None, **native},
        num_nodes=role.nodes,
        setup="\n".join(line for line in setup if line),
        env_vars=_environment(launch),
        packager=_shipping(launch),
    )


def _lepton(launch: Launch, role: Role, native: dict[str, Any], _several: bool) -> Any:
    from nemo_run import LeptonExecutor

    before = [*_installing(launch), *native.pop("pre_launch_commands", [])]
    return _made(
        LeptonExecutor,
        {"gpus_per_node": launch.cluster.gpus_per_node, **native},
        nodes=role.nodes,
        nprocs_per_node=1,
        pre_launch_commands=before,
        env_vars=_environment(launch),
        packager=_shipping(launch),
    )


def _kubernetes(launch: Launch, role: Role, native: dict[str, Any], _several: bool) -> Any:
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    if launch.cluster.code not in {"tree", "installed"}:
        where = f"code={launch.cluster.code}"
        raise InputError(where, "nothing runs in a pod before it", "put it into the image")
    return _made(
        KubeflowExecutor,
        {"gpus_per_node": launch.cluster.gpus_per_node or None, **native},
        num_nodes=role.nodes,
        nprocs_per_node=1,
        env_vars=_environment(launch),
        packager=_shipping(launch),
    )


def _environment(launch: Launch) -> dict[str, str]:
    """Variables of every process of the run."""
    cluster = launch.cluster
    found = {"PYTHONUNBUFFERED": "1"}
    if cluster.code == "tree":
        found["PYTHONPATH"] = str(working_tree()) if cluster.in_place else THERE
    elif cluster.code != "installed" and cluster.in_place:
        found["PYTHONPATH"] = str(_code_dir(launch))
    return {**found, **cluster.env}


def _quoted(environment: Mapping[str, str]) -> dict[str, str]:
    """Values as words of a shell, which NeMo-Run does not quote."""
    return {name: shlex.quote(value) for name, value in environment.items()}


def _code_dir(launch: Launch) -> Path:
    return launch_dir(launch.run_dir) / "code"


def _installing(launch: Launch) -> list[str]:
    """Lines that install the package that `code` names, if it names one."""
    cluster = launch.cluster
    if cluster.code in {"tree", "installed"}:
        return []
    words = [cluster.interpreter, "-m", "pip", "install", "--quiet"]
    if cluster.in_place:
        words += ["--no-deps", "--upgrade", "--target", str(_code_dir(launch))]
    return [shlex.join([*words, cluster.code])]


def _requeueing(launch: Launch) -> str:
    """Lines of the script that Slurm executes: start it again if the run asks for it."""
    again, cancelled = (shlex.quote(str(f(launch.run_dir))) for f in (again_file, cancelled_file))
    return f"""rm -f {again}
start_again() {{
    if [ -e {again} ] && [ ! -e {cancelled} ] &&
        [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.cluster.requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap start_again EXIT"""


def _shipping(launch: Launch) -> Any:
    """What brings the code to nodes that do not see it."""
    from megatron_bupo.launch.shipping import Nothing, WorkingTree

    if launch.cluster.code != "tree":
        return Nothing()
    if not (working_tree() / ".git").exists():
        reason = f"{working_tree()} is no git repository, of which one knows what belongs to it"
        raise InputError("code=tree", reason, "name a requirement such as megatron-bupo==1.0")
    return WorkingTree(tree=str(working_tree()))
