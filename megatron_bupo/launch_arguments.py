"""The options of `launch`, `status`, `logs` and `cancel`."""

from __future__ import annotations

import argparse
from functools import partial

from megatron_bupo.command_line import Parser, add_overrides, count


def add_launch(commands: argparse._SubParsersAction[Parser]) -> None:
    """`launch`, and what asks after what it has launched."""
    parser = commands.add_parser(
        "launch",
        help="train on a cluster",
        description="Hand a recipe to what conf/clusters/NAME.yaml describes: this machine, Slurm, "
        "or a cloud, by NeMo-Run. A job that is preempted saves what it has learned, is started "
        "again, and goes on.",
        epilog="example: megatron-bupo launch conf/bupo_qwen3_4b.yaml --on slurm --nodes 2 "
        "model.path=/models/Qwen3-4B run_dir=/runs/qwen3_4b",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML, as `train --config`")
    parser.add_argument("--on", metavar="NAME", required=True, help="a cluster, or its YAML file")
    parser.add_argument("--nodes", metavar="N", type=count, help="default: what the layout needs")
    parser.add_argument("--dry-run", action="store_true", help="print the job, and start nothing")
    parser.add_argument("--detach", action="store_true", help="return when it has been handed over")
    add_overrides(parser)
    parser = _of_run(commands, "status", "how a launched run is", "Ask the scheduler and the run.")
    parser = _of_run(commands, "logs", "what ranks and servers of a run have said", "Show logs.")
    parser.add_argument("--rank", metavar="N", type=partial(count, least=0), help="of this rank")
    parser.add_argument("--follow", action="store_true", help="and what is added, until it is over")
    parser.add_argument("--lines", metavar="N", type=count, default=40, help="of each; default: 40")
    parser = _of_run(commands, "cancel", "end a launched run", "It saves what it has learned.")
    parser.add_argument("--now", action="store_true", help="without saving")


def _of_run(
    commands: argparse._SubParsersAction[Parser], name: str, idea: str, description: str
) -> Parser:
    parser = commands.add_parser(name, help=idea, description=description, allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN", help="its run_dir")
    return parser
