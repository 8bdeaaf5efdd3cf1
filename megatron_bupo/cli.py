"""`megatron-bupo COMMAND ...`: what can be asked for. What a command does is in `commands/`.

A mistake of the user's is one line on stderr and exit code 2; anything else is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_bupo import __version__
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.launch.local import RankFailed, Terminated

COMMANDS = {  # name -> module with `run(args)`, imported when it is the one that was asked for
    "train": "megatron_bupo.commands.train",
    "score": "megatron_bupo.commands.score",
    "bed": "megatron_bupo.commands.bed",
}


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong command line the way everything else is reported."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError("command line", message, f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's) asks for; the exit code."""
    if sys.path[0] != (here := str(Path.cwd())):  # as with `python -m`: a user's own functions
        sys.path.insert(0, here)
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        importlib.import_module(COMMANDS[args.command]).run(args)
    except InputError as error:
        return _ended(2, f"error: {error}")
    except (RankFailed, RunStopped) as error:
        return _ended(1, f"error: {error}", *_notes_of(error))
    except KeyboardInterrupt as error:
        return _ended(130, *_notes_of(error))
    except Terminated as error:
        return _ended(143, *_notes_of(error))
    return 0


def _ended(code: int, *lines: str) -> int:
    """`code`, after telling why."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not per rank
        for line in lines:
            print(line, file=sys.stderr)
    return code


def _notes_of(error: BaseException) -> list[str]:
    """What was noted on `error` on its way up."""
    return getattr(error, "__notes__", [])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`argv` as a namespace with `command`, its options and `overrides`."""
    args, rest = _parser().parse_known_args(argv)
    # argparse takes one run of positionals; overrides may stand on either side of an option.
    options = [word for word in rest if word.startswith("-")]
    if options or (rest and not hasattr(args, "overrides")):
        unknown = (options or rest)[0]
        way_out = f"see `megatron-bupo {args.command} --help`"
        raise InputError(f"command line: {unknown}", "unknown argument", way_out)
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-bupo",
        description="Bottom-up Policy Optimization (arXiv 2512.19673) on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-bupo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_score(commands)
    _add_bed(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or resume a run",
        description="Train as a YAML file and overrides say. Starts the local processes that the "
        "layout needs, or is one rank under torchrun. A run_dir that holds a checkpoint resumes.",
        epilog="example: megatron-bupo train --config conf/demo.yaml steps=20 parallel.pp=2",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with what differs from defaults")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the layout, and start nothing",
    )
    _add_overrides(parser)


def _add_score(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "score",
        help="log-probs and entropies of given responses under a policy",
        description='Read rows {"input_ids": [...], "prompt_length": n}; for each, in order, write '
        '{"logprobs": [...], "entropies": [...]} of the response tokens (nats, fp32).',
        epilog="example: torchrun --nproc-per-node 4 -m megatron_bupo score --model DIR "
        "--data rows.jsonl --policy layer=6 --out out.jsonl parallel.tp=2 parallel.pp=2",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="HF checkpoint directory")
    parser.add_argument("--data", metavar="FILE", required=True, help="JSONL, a row per response")
    parser.add_argument(
        "--policy", metavar="full|layer=N", default="full", help="layers count from 1"
    )
    parser.add_argument(
        "--read-out-norm",
        action="store_true",
        help="apply the final norm before unembedding an internal layer",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL to write")
    _add_overrides(parser)


def _add_bed(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "bed",
        help="make the tiny reasoning model and data of the demo",
        description="Make the chain-sum bed: a base model, training and held-out prompts.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where it goes")


def _add_overrides(parser: Parser) -> None:
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings by dotted key, the value in YAML; later ones win",
    )
