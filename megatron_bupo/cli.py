"""`megatron-bupo COMMAND ...`: what can be asked for. What a command does is in `commands/`.

A mistake of the user's is one line on stderr and exit code 2; anything else is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.arguments import parser
from megatron_bupo.errors import BAD_INPUT, TRY_AGAIN, InputError, Preempted, RunStopped
from megatron_bupo.launch.local import RankFailed, Terminated

HEARD_S = 10.0  # for the rank that speaks for its machine to say what is wrong

COMMANDS = {  # name -> module with `run(args)`, imported when it is the one that was asked for
    "train": "megatron_bupo.commands.train",
    "eval": "megatron_bupo.commands.evaluate",
    "generate": "megatron_bupo.commands.generate",
    "score": "megatron_bupo.commands.score",
    "analyze": "megatron_bupo.commands.analyze",
    "rollouts": "megatron_bupo.commands.rollouts",
    "report": "megatron_bupo.commands.report",
    "convert": "megatron_bupo.commands.convert",
    "plan": "megatron_bupo.commands.plan",
    "doctor": "megatron_bupo.commands.doctor",
    "launch": "megatron_bupo.commands.launch",
    "status": "megatron_bupo.commands.status",
    "logs": "megatron_bupo.commands.logs",
    "cancel": "megatron_bupo.commands.cancel",
    "bed": "megatron_bupo.commands.bed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's) asks for; the exit code."""
    if sys.path[0] != (here := str(Path.cwd())):  # as with `python -m`: a user's own functions
        sys.path.insert(0, here)
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        importlib.import_module(COMMANDS[args.command]).run(args)
    except InputError as error:
        return _ended(BAD_INPUT, f"error: {error}")
    except Preempted as error:
        return _ended(TRY_AGAIN, *_notes_of(error))
    except (RankFailed, RunStopped) as error:
        return _ended(1, f"error: {error}", *_notes_of(error))
    except KeyboardInterrupt as error:
        return _ended(130, *_notes_of(error))
    except Terminated as error:
        return _ended(143, *_notes_of(error))
    return 0


def _ended(code: int, *lines: str) -> int:
    """`code`, after telling why: once per machine, not per rank."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if code == BAD_INPUT and not first:
        time.sleep(HEARD_S)  # torchrun ends all ranks with the first that ends
    if first or code == BAD_INPUT:
        for line in lines:
            print(line, file=sys.stderr)
    return code


def _notes_of(error: BaseException) -> list[str]:
    """What was noted on `error` on its way up."""
    return getattr(error, "__notes__", [])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`argv` as a namespace with `command`, its options and `overrides`."""
    args, rest = parser().parse_known_args(argv)
    # argparse takes one run of positionals; overrides may stand on either side of an option.
    options = [word for word in rest if word.startswith("-")]
    if options or (rest and not hasattr(args, "overrides")):
        unknown = (options or rest)[0]
        way_out = f"see `megatron-bupo {args.command} --help`"
        raise InputError(f"command line: {unknown}", "unknown argument", way_out)
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args
