"""What the command lines of benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_bupo.bed.prepare import BED
from megatron_bupo.config import expand


def parser(doc: str | None, *, json: str = "write the rows here") -> argparse.ArgumentParser:
    """Of the module that `doc` describes, with `--json`."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n", maxsplit=1)[0])
    made.add_argument("--json", type=Path, metavar="FILE", help=json)
    return made


def add_numbers(parser: argparse.ArgumentParser, numbers: Mapping[str, int]) -> None:
    """An option for each of `numbers`, whose values are defaults."""
    for name, default in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")


def add_bed(parser: argparse.ArgumentParser) -> None:
    """`--bed`, where the demo's model and data are."""
    parser.add_argument(
        "--bed",
        type=Path,
        metavar="DIR",
        default=Path(expand(BED)),
        help="the demo's model and data, made if missing; default: %(default)s",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value`, any number of them."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other setting")
