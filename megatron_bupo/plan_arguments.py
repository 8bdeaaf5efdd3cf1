"""The options of `megatron-bupo plan` and `megatron-bupo doctor`: before anything runs."""

from __future__ import annotations

import argparse
from functools import partial

from megatron_bupo.command_line import Parser, add_overrides, count


def add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command that tells whether a recipe fits."""
    parser = commands.add_parser(
        "plan",
        help="does a recipe fit, and how long does a step take?",
        description="Memory of every rank and server in each phase, the time of a step, and "
        "layouts that fit, from sizes and stated rates alone. Exit code 2 if the recipe does not "
        "fit, with the smallest change that makes it fit.",
        epilog="example: megatron-bupo plan conf/bupo_llama3_3_70b.yaml --gpu H200 --gpus 128 "
        "parallel.pp=2",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML, as `train --config` takes it")
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=count,
        help="of trainer and servers together; default: those that the recipe's layout asks for",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", default="H100", help="A100, H100 (default), H200, B200, CPU"
    )
    parser.add_argument(
        "--hardware", metavar="FILE", help="YAML of rates; default: megatron_bupo/planner's own"
    )
    parser.add_argument(
        "--response-tokens",
        metavar="N",
        type=count,
        help="mean length of a response; default: half of rollout.max_response_tokens",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=count,
        help="mean length of a prompt; default: half of data.max_prompt_tokens",
    )
    parser.add_argument(
        "--propose",
        metavar="N",
        type=partial(count, least=0),
        default=3,
        help="show the N fastest layouts that fit; default: 3",
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it; -: to stdout, alone")
    add_overrides(parser)


def add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command that tells what is amiss on this machine."""
    parser = commands.add_parser(
        "doctor",
        help="what is amiss on this machine, and the way out",
        description="Look at versions, devices, ranks that reach each other, servers, disk, "
        "memory, limits and, with a recipe, at what it names. Under torchrun the ranks are its "
        "own. Exit code 1 if there is a problem.",
        epilog="example: megatron-bupo doctor --config conf/bupo_qwen3_8b.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML, as `train --config` takes it")
    parser.add_argument("--json", metavar="FILE", help="write the findings; -: to stdout, alone")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=count,
        default=30,
        help="for each answer of a rank or server; default: 30",
    )
    add_overrides(parser)
