"""`megatron-bupo doctor`: what is amiss on this machine, and the way out."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bupo.command_line import write_json
from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.doctor.disk import disk
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, looked_at, of_error
from megatron_bupo.doctor.machine import devices, machine
from megatron_bupo.doctor.ranks import ranks
from megatron_bupo.doctor.recipe import recipe
from megatron_bupo.doctor.servers import servers
from megatron_bupo.doctor.versions import versions
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.launch.local import is_first_rank, under_torchrun

WIDTH = 110  # of what goes to a file
STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}


def run(args: Namespace) -> None:
    """Look, and tell; RunStopped (exit code 1) if there is a problem."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what fails of it is a finding
    found = list(examine(args))
    if is_first_rank():
        _tell(found, args.json)
    problems = [finding for finding in found if finding.level == PROBLEM]
    if problems:
        first = problems[0]
        raise RunStopped(f"{count(found)}; the first problem: {first.what}; {first.way_out}")


def _tell(found: Sequence[Finding], file: str | None) -> None:
    """To the terminal, and as JSON to a `file`, or in its place to stdout (`-`)."""
    text = json.dumps([asdict(finding) for finding in found], indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    show(found, Console(width=None if sys.stdout.isatty() else WIDTH))
    if file:
        write_json(Path(expand(file)), text)


def examine(args: Namespace) -> Iterator[Finding]:
    """All findings; ranks but the first look at what they have to do with others alone."""
    # First, while the others wait for it
    yield from looked_at("ranks", lambda: ranks(args.timeout))
    if not is_first_rank():
        return
    config = None
    if args.config is not None or args.overrides:
        try:
            config = load_config(args.config, args.overrides)
        except InputError as error:
            yield of_error("recipe", error)
    yield from looked_at("versions", lambda: versions(config, gpus=_gpus(), timeout_s=args.timeout))
    yield from looked_at("devices", devices)
    yield from looked_at("machine", lambda: machine(config))
    if config is not None:
        yield from _of_the_recipe(config, args.timeout)


def _of_the_recipe(config: Config, timeout_s: float) -> Iterator[Finding]:
    world = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    yield from looked_at("recipe", lambda: recipe(config, world))
    yield from looked_at("disk", lambda: disk(config))
    yield from looked_at("servers", lambda: servers(config, timeout_s))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def show(found: Sequence[Finding], console: Console) -> None:
    """A line for each finding, and below it the way out."""
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in found:
        level = Text(finding.level, style=STYLES[finding.level])
        table.add_row(level, finding.area, Text(finding.what))
        if finding.way_out:
            table.add_row("", "", Text(f"-> {finding.way_out}"))
    console.print(table)
    console.print(count(found), style="bold")


def count(found: Sequence[Finding]) -> str:
    """How many of each."""
    numbers = {level: sum(f.level == level for f in found) for level in STYLES}
    return ", ".join(f"{number} {level}" for level, number in numbers.items())
