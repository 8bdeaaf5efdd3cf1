"""Which runs does a comparison consist of, and how do they come about? See compare_methods.py.

A run is what `megatron-bupo train` does with the config's file, the settings of a method and a
seed, in OUT/METHOD/seed_N, with all that it says in its log.txt. It is forked from this process,
which has imported everything, so it starts in a fraction of the time; a run that was killed goes on
from its checkpoint, and one that has ended is not begun again.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from megatron_bupo.checkpoints import newest_checkpoint, read_run
from megatron_bupo.cli import main as megatron_bupo
from megatron_bupo.config import Config, flatten, load_config
from megatron_bupo.errors import InputError
from megatron_bupo.launch.local import die_with_parent
from megatron_bupo.record.metrics import read_metrics

LOG = "log.txt"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
FREE = ("run_dir", "logging.", "checkpoint.")  # what may change without changing a result
POLL_S = 0.5


@dataclass(frozen=True)
class Method:
    """A row of the table: what it sets, those of the method that it changes first."""

    name: str
    changes: str | None  # the method that it is made from; None: it is the reference
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Planned:
    """One run."""

    method: Method
    seed: int
    run_dir: Path
    arguments: Sequence[str]  # of `megatron-bupo train`
    config: Config

    def __str__(self) -> str:
        return f"{self.method.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.run_dir / LOG

    def steps_done(self) -> int:
        """Steps on record."""
        return len(read_metrics(self.run_dir))

    def has_ended(self) -> bool:
        """Is its last checkpoint there? One with other settings is refused.

        Raises:
            InputError: what is there was trained with other settings.
        """
        newest = newest_checkpoint(self.run_dir)
        if newest is None:
            return False
        step, path = newest
        default = flatten(Config())  # what has no word for a setting has its default
        before, now = default | read_run(path)["config"], default | flatten(self.config)
        for key in before | now:
            was, is_now = (json.dumps(known.get(key)) for known in (before, now))
            if was != is_now and not key.startswith(FREE):
                reason = f"was trained with {key}={was}, which is now {is_now}"
                raise InputError(str(self.run_dir), reason, "choose another --out, or remove it")
        return step == self.config.steps


def read_methods(path: Path) -> tuple[dict[str, Method], dict[str, list[str]]]:
    """The methods in the file by name, the reference first; and the names in each panel."""
    panels: dict[str, list[str]] = {}
    methods: dict[str, Method] = {}
    for panel, rows in _panels_of(path):
        panels[panel] = [str(name) for name in rows]
        for name, own in ((str(name), own) for name, own in rows.items() if own is not None):
            methods[name] = _method(path, name, own, methods)
    for name in (name for names in panels.values() for name in names):
        if name not in methods:
            raise InputError(f"{path}: {name}", "has no settings in any panel", "write {} for none")
    return methods, panels


def _panels_of(path: Path) -> list[tuple[str, dict[Any, Any]]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "give a YAML file of methods") from None
    except yaml.YAMLError as error:
        reason = f"is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(str(path), reason, "quote or correct it") from None
    rows = list(found.items()) if isinstance(found, dict) else []
    if not rows or not all(isinstance(methods, dict) for _, methods in rows):
        raise InputError(str(path), "is no table of methods", "write panel: {method: {key: value}}")
    return [(str(panel), methods) for panel, methods in rows]


def _method(path: Path, name: str, own: Any, known: Mapping[str, Method]) -> Method:
    where = f"{path}: {name}"
    if not NAME.fullmatch(name):
        raise InputError(where, "is no name for a directory", "use letters, digits and _.+-")
    if not isinstance(own, dict):
        raise InputError(f"{where}={own}", "is not a mapping of settings", "write {key: value}")
    if name in known:
        raise InputError(where, "has settings twice", "give it none in all panels but one")
    settings = {str(key): value for key, value in own.items()}
    changes = settings.pop("from", next(iter(known), None))
    if changes is None:
        return Method(name, None, settings)
    if changes not in known:
        above = ", ".join(known)
        raise InputError(f"{where}: from={changes}", "is no method above it", f"choose of {above}")
    return Method(name, changes, {**known[changes].settings, **settings})


def plan(method: Method, seed: int, out: Path, *, config: str, overrides: Sequence[str]) -> Planned:
    """The run of `method` with `seed`. What the method sets comes after the `overrides` of all."""
    run_dir = out / method.name / f"seed_{seed}"
    own = [f"{key}={json.dumps(value)}" for key, value in method.settings.items()]
    overrides = [*overrides, *own, f"seed={seed}", f"run_dir={run_dir}"]
    try:
        settled = load_config(config, overrides)
    except InputError as error:
        raise of_method(method, error) from None
    return Planned(method, seed, run_dir, ["--config", config, *overrides], settled)


def of_method(method: Method, error: InputError) -> InputError:
    """`error`, and whose it is."""
    where, reason, way_out = error.args
    return InputError(f"{method.name}: {where}", reason, way_out)


class Ended(NamedTuple):
    """A run that is over."""

    run: Planned
    code: int  # 0: it has trained to its end
    seconds: float

    def __str__(self) -> str:
        if self.code == 0:
            accuracy = read_metrics(self.run.run_dir)[-1].get("eval/accuracy_mean", math.nan)
            return f"{self.run}: held-out accuracy {accuracy:.3f}, {self.seconds:.0f} s"
        said = self.run.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "nothing was said")
        return f"{self.run}: failed after {self.run.steps_done()} steps ({self.run.log}): {last}"


def run_all(planned: Sequence[Planned], *, jobs: int, console: Console) -> list[Ended]:
    """Run them, `jobs` side by side, and show how far they are."""
    over: list[Ended] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bars:
        whole = bars.add_task("all steps", total=sum(run.config.steps for run in planned))
        bar_of: dict[Planned, TaskID] = {}
        for running, ended in _under_way(planned, jobs):
            for one in ended:
                over.append(one)
                bars.remove_task(bar_of.pop(one.run))
                told = f"{len(over)}/{len(planned)} {one}"
                console.print(told, highlight=False, markup=False, soft_wrap=True)
            done = {run: run.steps_done() for run in running}
            for run, steps in done.items():
                if run not in bar_of:
                    bar_of[run] = bars.add_task(str(run), total=run.config.steps)
                bars.update(bar_of[run], completed=steps)
            behind = sum(one.run.config.steps for one in over)
            bars.update(whole, completed=behind + sum(done.values()))
    return over


def _under_way(
    planned: Sequence[Planned], jobs: int
) -> Iterator[tuple[Sequence[Planned], Sequence[Ended]]]:
    """Now and then: the runs that are going, and those that have ended since. None outlives it."""
    for module in ("megatron_bupo.train", "matplotlib.backends.backend_agg"):
        importlib.import_module(module)  # before the forks, so that it costs once
    waiting = deque(planned)
    going: dict[Any, tuple[Planned, float]] = {}
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.popleft()
                going[_start(run)] = run, time.monotonic()
            yield [run for run, _ in going.values()], []
            wait([process.sentinel for process in going], timeout=POLL_S)
            ended = []
            for process in [process for process in going if not process.is_alive()]:
                run, start = going.pop(process)
                ended.append(Ended(run, process.exitcode, time.monotonic() - start))
            yield [run for run, _ in going.values()], ended
    finally:
        for process in going:
            process.kill()
            process.join()


def _start(run: Planned) -> Any:
    """The run in a process of its own, which ends with this one."""
    import torch

    run.run_dir.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=_train, args=(os.getpid(), run.arguments, run.log))
    gc.freeze()  # else a child's collector walks through, and so copies, all that we hold
    process.start()
    return process


def _train(parent: int, arguments: Sequence[str], log: Path) -> None:
    """A run's life; its exit code is that of `megatron-bupo`."""
    import torch

    die_with_parent(parent)
    with log.open("a", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # runs stand side by side, and equal numbers give equal bits
    sys.argv = ["megatron-bupo", "train", *arguments]  # for what it tells of itself
    sys.exit(megatron_bupo(sys.argv[1:]))
