"""`megatron-bupo launch RECIPE --on NAME`: from a recipe to a cluster."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import FrameType

from megatron_bupo.config import expand, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import TRY_AGAIN, InputError, Preempted, RunStopped
from megatron_bupo.launch import jobs, nemo, record, secrets
from megatron_bupo.launch.cluster import SHARED, Cluster, load_cluster
from megatron_bupo.launch.folder import cancelled_file, launch_dir, node_file
from megatron_bupo.launch.logs import last_error
from megatron_bupo.launch.placement import SERVERS, Launch, Role, roles, working_tree
from megatron_bupo.stopping import SIGNALS

_PLAIN = re.compile(r"[\w./+=@:,-]+")
HANDED_OVER_S = 120.0  # for a detached process to have begun


def run(args: Namespace) -> None:
    """Check all that can be checked here, then hand the job over and perhaps follow it."""
    cluster = load_cluster(args.on)
    config = load_config(args.recipe, args.overrides)
    secrets.refuse_in_overrides(args.overrides)
    launch = Launch(
        recipe=_recipe(args.recipe, cluster),
        overrides=tuple(args.overrides),
        config=config,
        cluster=cluster,
        directory=Path.cwd(),
        nodes=args.nodes,
    )
    parts = roles(launch)
    _check(launch, parts)
    if args.dry_run:
        print(_described(launch, parts))
        print(nemo.script(launch, parts))
        return
    _refuse_a_second(launch)
    print(_described(launch, parts), flush=True)
    if cluster.kind == "local":
        _on_this_machine(launch, parts, detach=args.detach)
        return
    with nemo.submitted(launch, parts, wait=False) as submitted:
        launched = record.Launched.of(launch, parts, submitted)
        record.write(launch.home, launched)
        asked = f"megatron-bupo status|logs|cancel {_shown(launch)}"
        print(f"job {submitted.job}; ask by: {asked}", flush=True)
    if not args.detach:
        _follow(launch, launched)


def _recipe(name: str, cluster: Cluster) -> str:
    """The recipe as nodes know it: within the working tree, where that is shipped."""
    if cluster.in_place:
        return name
    path = Path(expand(name)).absolute()
    if not path.is_relative_to(working_tree()):
        reason = f"is not in {working_tree()}, which is what nodes get"
        raise InputError(name, reason, "put it there")
    return str(path.relative_to(working_tree()))


def _check(launch: Launch, parts: list[Role]) -> None:
    config, cluster = launch.config, launch.cluster
    if config.debug.rollout_only:
        raise InputError("debug.rollout_only=true", "is not launched", "use `megatron-bupo train`")
    if not cluster.in_place and not Path(expand(config.run_dir)).is_absolute():
        reason = "is relative to a directory that nodes lose with the job"
        raise InputError(f"run_dir={config.run_dir}", reason, "write its path on the cluster")
    if cluster.kind == "slurm" and not _PLAIN.fullmatch(str(launch.home)):
        reason = f"NeMo-Run writes {launch.home} into Slurm's script as it is, without quotes"
        way_out = "choose a path of letters, digits and . _ - + = @ : , /"
        raise InputError(f"run_dir={config.run_dir}", reason, way_out)
    if cluster.in_place and cluster.executor.get("container_image") is None:
        check(_seen_by_trainer(config, parts), parts[0].nodes * parts[0].processes)


def _seen_by_trainer(config: Config, parts: list[Role]) -> Config:
    """With addresses of servers, where its first rank does not start them."""
    count = sum(part.nodes * part.processes for part in parts[1:]) + parts[0].beside
    if not count:
        return config
    addresses = [f"http://server-{i}:30000" for i in range(count)]
    return replace(config, servers=replace(config.servers, addresses=addresses))


def _described(launch: Launch, parts: list[Role]) -> str:
    """Who runs what, in comments."""
    cluster = launch.cluster
    lines = [f"{part.name}: {_number(part.nodes, 'node')} x {_team(part)}" for part in parts]
    lines.append(f"code: {record.code_in_words(cluster.code)}")
    lines.append(f"run_dir: {launch.run_dir}")
    return "".join(f"# {line}\n" for line in lines)


def _team(part: Role) -> str:
    """Who is on a node."""
    if part.name == SERVERS:
        return f"{part.processes} servers"
    beside = f", with {_number(part.beside, 'server')} on them" if part.beside else ""
    return f"{part.processes} ranks{beside}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _refuse_a_second(launch: Launch) -> None:
    """A run directory belongs to one job at a time."""
    try:
        before = record.read(launch.home)
    except InputError:
        return
    state = jobs.state(before, launch.home)
    if not jobs.is_over(state):
        raise InputError(
            f"run_dir={launch.config.run_dir}",
            f"job {before.job} is at work there ({state})",
            f"wait for it, or: megatron-bupo cancel {_shown(launch)}",
        )


def _on_this_machine(launch: Launch, parts: list[Role], *, detach: bool) -> None:
    """Run it here; `detach`: in a process of its own, which outlives this one."""
    run_dir = launch.run_dir
    if not detach:
        node_file(run_dir).unlink(missing_ok=True)
        with nemo.submitted(launch, parts, wait=True) as submitted:
            record.write(run_dir, record.Launched.of(launch, parts, submitted))
            _hand_on_signals(run_dir)
        _ended(jobs.exit_code(run_dir), run_dir)
        return
    launch_dir(run_dir).mkdir(parents=True, exist_ok=True)
    node_file(run_dir).unlink(missing_ok=True)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    with (launch_dir(run_dir) / "launch.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_bupo", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + HANDED_OVER_S
    while not node_file(run_dir).exists():
        over = process.poll() is not None or time.monotonic() > deadline
        if over and not node_file(run_dir).exists():  # a short run may just have come to its end
            raise RunStopped(f"it did not start; see {launch_dir(run_dir) / 'launch.log'}")
        time.sleep(0.1)
    print(f"ask by: megatron-bupo status|logs|cancel {_shown(launch)}")


def _hand_on_signals(run_dir: Path) -> None:
    """From now on who ends this process asks the run to save and end, and who insists ends it: the
    run is in a session of its own, where no terminal's Ctrl-C arrives.
    """
    asked: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        Thread(target=_end, args=(run_dir, bool(asked)), daemon=True).start()
        asked.append(number)

    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, hand_on)


def _end(run_dir: Path, now: bool) -> None:
    """End the run; one that was started just now is waited for."""
    deadline = time.monotonic() + HANDED_OVER_S
    while not jobs.end(run_dir, now=now) and time.monotonic() < deadline:
        time.sleep(0.1)


def _shown(launch: Launch) -> str:
    """What it is asked for by, as a word of a shell."""
    home = launch.home
    near = home.is_relative_to(launch.directory)
    return shlex.quote(str(home.relative_to(launch.directory) if near else home))


def _follow(launch: Launch, launched: record.Launched) -> None:
    """Show what it says until it is over. Ctrl-C leaves it at work."""
    from megatron_bupo.commands.logs import follow

    try:
        follow(launched, launch.home, rank=0, lines=0)
    except KeyboardInterrupt as error:
        error.add_note(f"job {launched.job} goes on")
        raise
    if launched.kind in SHARED:
        why = last_error(launch.home, launched.experiment)
        _ended(jobs.exit_code(launch.home), launch.home, why)
    elif not jobs.has_succeeded(state := jobs.state(launched, launch.home)):
        raise RunStopped(f"the run is {state}; see: megatron-bupo logs {_shown(launch)}")


def _ended(code: int | None, run_dir: Path, why: str | None = None) -> None:
    if code == 0:
        return
    if code == TRY_AGAIN:
        preempted = Preempted("stopped")
        how = "cancelled" if cancelled_file(run_dir).exists() else "stopped"
        preempted.add_note(f"{how}; the same command goes on where it was")
        raise preempted
    how = "was killed" if code is None else f"ended with code {code}"
    how += f": {why}" if why is not None and code is not None else ""
    raise RunStopped(f"the run {how}; see: megatron-bupo logs {shlex.quote(str(run_dir))}")
