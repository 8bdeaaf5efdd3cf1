"""What the options of all commands are made of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megatron_bupo.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong command line the way everything else is reported."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError("command line", message, f"see `{self.prog} --help`")


def count(text: str, *, least: int = 1) -> int:
    """A number from `least` up."""
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} up")
    return int(text)


def write_json(path: Path, text: str) -> None:
    """What `--json` asked for."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        where = f"--json {path}"
        raise InputError(where, f"cannot be written ({error.strerror})", "name a file") from None


def add_overrides(parser: Parser) -> None:
    """Settings at the end of the line."""
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings by dotted key, the value in YAML; later ones win",
    )
