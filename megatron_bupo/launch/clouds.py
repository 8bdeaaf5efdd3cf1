"""Executors of clouds: nodes that see none of our files, and get what is shipped.

Preemption is SIGTERM to the first process of a container, and a shell does not pass it on: the
shell that NeMo-Run starts there becomes (`exec`) the node. Who starts it again is the cloud's
business: Kubernetes does, in place, as often as its Job's backoffLimit says; Lepton and SkyPilot,
as NeMo-Run submits to them, do not, and the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from megatron_bupo.errors import InputError
from megatron_bupo.launch.folder import launch_dir
from megatron_bupo.launch.native import environment, installing, made, shipping
from megatron_bupo.launch.placement import THERE, Launch, Role

IN_CONTAINERS = ("lepton", "kubernetes")  # whose first process is a script of NeMo-Run's
LARGEST_WORD = 128 * 1024  # bytes that Linux takes in a single argument
# Set by a script that Lepton's containers fetch from GitHub, and here for those that cannot
_LEPTON_NODES = (
    "export NODE_RANK=$LEPTON_JOB_WORKER_INDEX"
    " BUPO_FIRST_NODE=$LEPTON_JOB_WORKER_PREFIX-0.$LEPTON_SUBDOMAIN"
)


def skypilot(launch: Launch, role: Role, native: dict[str, Any]) -> Any:
    """A task of SkyPilot's on machines that it rents."""
    from nemo_run import SkypilotExecutor

    setup = [*installing(launch), native.pop("setup", None) or ""]
    return made(
        SkypilotExecutor,
        {"gpus_per_node": launch.cluster.gpus_per_node or None, **native},
        num_nodes=role.nodes,
        setup="\n".join(line for line in setup if line),
        env_vars=environment(launch),
        packager=shipping(launch),
    )


def lepton(launch: Launch, role: Role, native: dict[str, Any]) -> Any:
    """A batch job of DGX Cloud Lepton's."""
    from leptonai.api.v1.types.deployment import Mount
    from nemo_run import LeptonExecutor

    for mount in native.get("mounts", []):
        for key in ("path", "mount_path", "from"):
            if not isinstance(mount, dict) or not mount.get(key):
                where = f"executor.mounts: {mount}"
                raise InputError(where, f"a mount needs {key}", "see conf/clusters/lepton.yaml")
        Mount(**mount)
    packager = shipping(launch)
    packed = packager.packed_bytes()
    if packed * 4 / 3 > 0.9 * LARGEST_WORD:  # NeMo-Run adds its own, and writes it as base64
        raise InputError(
            f"code={launch.cluster.code}",
            f"{packed / 1024:.0f} KiB, and NeMo-Run hands files to Lepton in a word of a command, "
            "which holds 90",
            "put the code on a mount, and set code: installed and env: {PYTHONPATH: where it is}; "
            "or name a requirement",
        )
    before = [*installing(launch), _LEPTON_NODES, *native.pop("pre_launch_commands", [])]
    return made(
        LeptonExecutor,
        {"gpus_per_node": launch.cluster.gpus_per_node, **native},
        nodes=role.nodes,
        nprocs_per_node=role.processes,
        pre_launch_commands=before,
        env_vars=environment(launch),
        packager=packager,
    )


def kubernetes(launch: Launch, role: Role, native: dict[str, Any]) -> Any:
    """A TrainJob of Kubeflow's."""
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    if launch.cluster.code not in {"tree", "installed"}:
        where = f"code={launch.cluster.code}"
        raise InputError(where, "nothing runs in a pod before it", "put it into the image")
    for key in ("image", "workdir_pvc"):
        if not native.get(key):
            raise InputError(f"executor.{key}", "has no value", "see conf/clusters/kubernetes.yaml")
    if Path(native.setdefault("workdir_pvc_path", "/bupo")) == Path(THERE).parent:
        # There NeMo-Run puts a link to the job's own folder: into the claim, if it is that
        where = f"executor.workdir_pvc_path={native['workdir_pvc_path']}"
        raise InputError(where, "jobs on the claim would run each other's code", "choose another")
    own = {
        "gpus_per_node": launch.cluster.gpus_per_node or None,
        "workdir_local_path": str(_staged(launch)),
    }
    # Not `env_vars`, which NeMo-Run would also write unquoted into a script
    env = [{"name": name, "value": value} for name, value in environment(launch).items()]
    env += native.pop("env_list", [])
    # As NeMo-Run would when it submits, and a dry run would not show
    claim = {"persistentVolumeClaim": {"claimName": native["workdir_pvc"]}}
    volumes = [{"name": "workdir", **claim}, *native.pop("volumes", [])]
    mounts = [{"name": "workdir", "mountPath": native["workdir_pvc_path"]}]
    mounts += native.pop("volume_mounts", [])
    return made(
        KubeflowExecutor,
        {**own, **native},
        num_nodes=role.nodes,
        nprocs_per_node=role.processes,
        env_list=env,
        volumes=volumes,
        volume_mounts=mounts,
    )


def shown(request: Any) -> str:
    """What a cloud would get: for Kubernetes the manifest and the script that it runs, for Lepton
    the options and the command of the script.
    """
    executor, command = request.executor, request.cmd
    if hasattr(executor, "get_job_body"):
        name = re.sub(r"[^a-z0-9-]+", "-", request.name.lower())  # and six random characters
        manifest = yaml.safe_dump(executor.get_job_body(name, command), sort_keys=False)
        return f"{manifest}---\n{(Path(executor.job_dir) / 'launch.sh').read_text()}"
    options = {field.name: getattr(executor, field.name) for field in fields(executor)}
    unlike = vars(type(executor)(container_image="", nemo_run_dir=""))
    hidden = {
        "packager",
        "launcher",
        "experiment_id",
        "job_dir",
        "experiment_dir",
        "_launcher_setup",
    }
    said = {k: v for k, v in options.items() if k not in hidden and v != unlike.get(k)}
    return yaml.safe_dump({**said, "command": " ".join(command)}, sort_keys=False, width=1000)


def _staged(launch: Launch) -> Path:
    """Where what is shipped to Kubernetes lies until it is: its executor asks no packager."""
    return launch_dir(launch.home) / "shipped"


@contextlib.contextmanager
def sent(launch: Launch, executor: Any) -> Iterator[None]:
    """What an executor leaves to us while it submits."""
    if launch.cluster.kind != "kubernetes":
        yield
        return
    staged = _staged(launch)
    shipping(launch).copy(staged / "code")
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the pod that copies, of which it waits in vain
            executor._core_v1_api.delete_namespaced_pod(
                executor._data_mover_pod_name(executor.job_name), executor.namespace
            )
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
