"""Roles as a NeMo-Run experiment: its executors, its script, its submission.

nemo_run takes seconds to import and is the extra `launch`, so this and `executors.py` do it late.
It keeps its files where NEMORUN_HOME says, which here is the run directory: with another place for
a `LocalTunnel` sbatch would not find its script. Commands are quoted here, for it joins words by
spaces. What a kind of cluster needs beside its native options is in `executors.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.launch import clouds, remote
from megatron_bupo.launch.executors import executor_for
from megatron_bupo.launch.folder import launch_dir, node_file
from megatron_bupo.launch.placement import Launch, Role, working_tree


@dataclass(frozen=True)
class Submitted:
    """A job that has been handed over."""

    experiment: str  # NeMo-Run's name of it
    job: str  # the scheduler's; of kind local the experiment's


def import_nemo(launch: Launch) -> Any:
    """NeMo-Run, with its home in the run directory.

    Raises:
        InputError: it is not installed, or does not import beside what is.
    """
    os.environ["NEMORUN_HOME"] = str(launch_dir(launch.home))
    try:
        return importlib.import_module("nemo_run")
    except Exception as error:  # leptonai >= 0.47 breaks it by an AttributeError, say
        raise InputError(
            f"--on (kind={launch.cluster.kind})",
            f"NeMo-Run does not import ({type(error).__name__}: {error})",
            'pip install "megatron-bupo[launch]"',
        ) from None


def script(launch: Launch, roles: Sequence[Role]) -> str:
    """What would be handed to the scheduler; nothing is left on disk."""
    with _experiment(launch, roles) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        job = experiment.jobs[0]
        infos = getattr(job, "_dryrun_infos", None) or [job._dryrun_info]
        text = "\n".join(_text(launch, info) for info in infos)
        shutil.rmtree(experiment._exp_dir)
    _remove_empty(launch)
    return text


def _text(launch: Launch, info: Any) -> str:
    """What a scheduler would get."""
    if launch.cluster.kind in clouds.IN_CONTAINERS:
        return clouds.shown(info.request)
    task = getattr(info.request, "task", None)
    if task is None:
        return str(info)
    # NeMo-Run 0.11.1 calls a function that SkyPilot 0.10.3 has moved
    for module in ("sky.utils.yaml_utils", "sky.utils.common_utils"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(module).dump_yaml_str(task.to_yaml_config())
    return str(task.to_yaml_config())


@contextlib.contextmanager
def submitted(launch: Launch, roles: Sequence[Role], *, wait: bool) -> Iterator[Submitted]:
    """Hand it over. With `wait` the end of the block is that of the run, where nobody but this
    process looks after it.

    Raises:
        InputError: it is not taken.
    """
    with _experiment(launch, roles) as experiment:
        node_file(launch.home).unlink(missing_ok=True)  # an earlier run's end is not this one's
        try:
            with clouds.sent(launch, experiment.jobs[0].executor):
                experiment.run(detach=not wait, tail_logs=wait)
        except (Exception, SystemExit) as error:
            shutil.rmtree(experiment._exp_dir, ignore_errors=True)
            _remove_empty(launch)
            said = "ssh lets nobody in" if isinstance(error, SystemExit) else remote.said(error)
            way_out = "mend the cluster's file, or what the message names"
            where = f"--on (kind={launch.cluster.kind})"
            raise InputError(where, f"does not take the job: {said}", way_out) from error
        experiment.detach = not wait  # of Kubernetes, too, where NeMo-Run would stay
        handle = experiment.jobs[0].handle
        yield Submitted(experiment._id, handle.rpartition("/")[2].rpartition("___")[2])


@contextlib.contextmanager
def _experiment(launch: Launch, roles: Sequence[Role]) -> Iterator[Any]:
    """An experiment with the roles as one job."""
    run = import_nemo(launch)
    executors = [executor_for(launch, role, several=len(roles) > 1) for role in roles]
    name = re.sub(r"[^A-Za-z0-9-]+", "-", launch.run_dir.name) or "run"
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with (
        contextlib.chdir(launch.directory if launch.cluster.in_place else working_tree()),
        run.Experiment(
            name,
            id=f"{name}_{stamp}",
            log_level="WARN",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        ) as experiment,
    ):
        scripts = [_script(run, launch, role) for role in roles]
        if len(roles) > 1:
            experiment.add(scripts, executor=executors, name=name)
        else:
            # Lepton knows jobs by their names, of those that are over, too, and cuts them at 34
            job = f"{name[:18]}-{stamp}" if launch.cluster.kind == "lepton" else name
            experiment.add(scripts[0], executor=executors[0], name=job)
        yield experiment


def _script(run: Any, launch: Launch, role: Role) -> Any:
    module, *words = role.words
    kind, interpreter = launch.cluster.kind, launch.cluster.interpreter
    if kind != "local":  # all others join words in a shell
        words = [shlex.quote(word) for word in words]
    if kind not in {"local", "lepton"}:  # and fill in `$NAME` themselves
        words = [word.replace("$", "$$") for word in words]
    if kind in clouds.IN_CONTAINERS:
        interpreter = f"exec {interpreter}"
    return run.Script(module, args=words, entrypoint=interpreter, m=True)


def _remove_empty(launch: Launch) -> None:
    """Remove what a dry run has made: directories with nothing in them."""
    home, launches = launch.home, launch_dir(launch.home)
    above = () if launch.cluster.in_place else (home.parent,)
    for path in [*sorted(launches.rglob("*"), reverse=True), launches, home, *above]:
        with contextlib.suppress(OSError):
            path.rmdir()
