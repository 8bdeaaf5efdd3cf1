"""A cluster's executor in NeMo-Run: its native options, and what we add so that a run is
preempted, requeued and found again.

Slurm: `--signal=USR2@grace` warns ranks before the time limit. A preempted run leaves the file
`again`, and the script that Slurm executes asks to be requeued when it finds it: exit codes do not
survive srun, which kills the slower node with the faster one. The working tree is used in place
where nodes see it, else shipped as it is, with what is not committed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError
from megatron_bupo.launch.clouds import kubernetes, lepton, skypilot
from megatron_bupo.launch.folder import (
    START,
    again_file,
    cancelled_file,
    launch_dir,
    node_file,
)
from megatron_bupo.launch.native import environment, installing, made, shipping
from megatron_bupo.launch.placement import Launch, Role, working_tree

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
        "local": partial(_local, several=several),
        "slurm": partial(_slurm, several=several),
        "skypilot": skypilot,
        "lepton": lepton,
        "kubernetes": kubernetes,
    }[cluster.kind]
    native = dict(cluster.executor)
    for key in native:
        if key in _OURS:
            raise InputError(f"executor.{key}", "is chosen elsewhere", f"see {_OURS[key]}")
    try:
        return make(launch, role, native)
    except InputError:
        raise
    except Exception as error:  # a package that is missing, a login, a value of the wrong type
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"kind={cluster.kind}", reason, "install or mend what it names") from None


def _local(launch: Launch, role: Role, native: dict[str, Any], *, several: bool) -> Any:
    from nemo_run import LocalExecutor, Packager

    if role.nodes > 1 or several:
        reason = f"the layout asks for {role.nodes} nodes"
        way_out = "raise gpus_per_node or processes_per_node, or launch on a cluster"
        raise InputError("--on local", reason, way_out)
    variables = {"PATH": os.environ.get("PATH", ""), **environment(launch)}  # else none
    return made(LocalExecutor, native, env_vars=variables, packager=Packager())


def _slurm(launch: Launch, role: Role, native: dict[str, Any], *, several: bool) -> Any:
    from nemo_run import LocalTunnel, Packager, SlurmExecutor, SSHTunnel

    cluster, ssh = launch.cluster, launch.cluster.ssh
    experiments = str(launch_dir(launch.run_dir) / "experiments")  # there, if there is a there
    if ssh:
        found = {name: expand(value) for name, value in ssh.items()}
        tunnel = SSHTunnel(**{**found, "job_dir": experiments})
    else:
        tunnel = LocalTunnel(job_dir=experiments)
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
    lines = [_requeueing(launch), *installing(launch), native.pop("setup_lines", None) or ""]
    return made(
        SlurmExecutor,
        {**own, **native},
        nodes=role.nodes,
        ntasks_per_node=1,
        time=cluster.time,
        signal=f"USR2@{cluster.grace_s}" if cluster.grace_s else None,
        heterogeneous=several,
        env_vars={**_quoted(environment(launch)), **started},
        setup_lines="\n".join(line for line in lines if line),
        container_mounts=mounts,
        tunnel=tunnel,
        packager=Packager() if cluster.in_place else shipping(launch),
        poll_estimated_start_time=False,
    )


def _quoted(environment: Mapping[str, str]) -> dict[str, str]:
    """Values as words of a shell, which NeMo-Run does not quote."""
    return {name: shlex.quote(value) for name, value in environment.items()}


def _requeueing(launch: Launch) -> str:
    """Lines of the script that Slurm executes: start it again if the run asks for it."""
    again, cancelled, node = (
        shlex.quote(str(file(launch.run_dir))) for file in (again_file, cancelled_file, node_file)
    )
    return f"""rm -f {again} {node}
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f {cancelled}
start_again() {{
    local code=$?
    if [ "$code" -ne 0 ] && [ ! -e {node} ]; then # nothing has trained
        echo "{{\\"code\\": $code}}" >{node}
    fi
    if [ -e {again} ] && [ ! -e {cancelled} ] &&
        [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.cluster.requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap start_again EXIT"""
