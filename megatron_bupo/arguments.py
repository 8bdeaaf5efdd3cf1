"""The commands, their options and what `--help` says of them; `cli.py` runs what was asked for."""

from __future__ import annotations

import argparse
from functools import partial

from megatron_bupo import __version__
from megatron_bupo.command_line import Parser, add_overrides, count
from megatron_bupo.convert_arguments import add_convert
from megatron_bupo.launch_arguments import add_launch
from megatron_bupo.plan_arguments import add_doctor, add_plan


def parser() -> Parser:
    """The command line of `megatron-bupo`."""
    parser = Parser(
        prog="megatron-bupo",
        description="Bottom-up Policy Optimization (arXiv 2512.19673) on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-bupo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_score(commands)
    _add_analyze(commands)
    _add_rollouts(commands)
    _add_report(commands)
    add_convert(commands)
    add_plan(commands)
    add_doctor(commands)
    add_launch(commands)
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
    add_overrides(parser)


def _add_eval(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="Avg@k and Pass@k of a model on a suite of benchmarks",
        description="Ask a model the questions of evaluation.benchmarks as evaluation.*, data.*, "
        "rollout.engine, servers.* and sglang.* say, and grade by reward.*. Stopped, the same "
        "command goes on.",
        epilog="example: megatron-bupo eval --model DIR --suite conf/eval/paper.yaml --beside "
        "Qwen3-4B rollout.engine=sglang servers.count=8",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="DIR", help="HF checkpoint or run_dir of a finished run, as model.path"
    )
    parser.add_argument(
        "--suite", metavar="FILE", help="YAML whose evaluation.benchmarks names them"
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/eval/MODEL-SUITE")
    parser.add_argument(
        "--beside", metavar="MODEL", help="show the paper's results; default: by the model's name"
    )
    add_overrides(parser)


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="responses of any policy to prompts, and how good they are",
        description="Sample from the full policy or from internal layer policies, as rollout.*, "
        "data.*, servers.* and sglang.* say. Several policies, or --grade, give a table.",
        epilog="example: megatron-bupo generate --model DIR --data eval.jsonl --grade "
        "--policy layer=2 --policy layer=4 --policy full rollout.responses_per_prompt=4",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML, e.g. that of a training run")
    parser.add_argument("--model", metavar="DIR", help="HF checkpoint directory, as model.path")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; repeatable")
    parser.add_argument("--data", metavar="FILE", help="prompts from a file or hub data set")
    _add_policy(parser, action="append", default=None)
    parser.add_argument(
        "--grade", action="store_true", help="compare with the answers in --data by reward.function"
    )
    parser.add_argument("--out", metavar="FILE", help="JSONL to write; `score` reads it")
    add_overrides(parser)


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
    _add_policy(parser, action="store", default="full")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL to write")
    add_overrides(parser)


def _add_analyze(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "analyze",
        help="entropy flow: what every layer and module of a model says at each token",
        description="Read the policies of all layers, attentions and FFNs at the tokens of a "
        "model's own responses. Stopped, the same command goes on.",
        epilog="example: megatron-bupo analyze --model DIR --data math500.jsonl --out OUT",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="DIR", help="HF checkpoint directory; without: draw --out again"
    )
    parser.add_argument("--data", metavar="FILE", help="prompts, to sample a response to each")
    parser.add_argument("--prompts", metavar="N", type=count, default=100, help="default: 100")
    parser.add_argument("--responses", metavar="FILE", help="JSONL as `score` reads it, instead")
    parser.add_argument("--out", metavar="DIR", required=True, help="where all of it goes")
    parser.add_argument("--per-token", action="store_true", help="keep every number of each token")
    parser.add_argument(
        "--lens-responses",
        metavar="N",
        type=partial(count, least=0),
        default=3,
        help="responses whose tokens the report goes through, layer by layer; default: 3",
    )
    parser.add_argument(
        "--read-out", choices=("raw", "norm"), default="raw", help="norm: through the final norm"
    )
    add_overrides(parser)


def _add_rollouts(commands: argparse._SubParsersAction[Parser]) -> None:
    rollouts = commands.add_parser(
        "rollouts", help="read the rollouts that a run has dumped", allow_abbrev=False
    )
    parser = rollouts.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "show",
        help="show them in the terminal or on a page",
        description="Show what debug.dump_rollouts or debug.rollout_only has written to a run_dir.",
        epilog="example: megatron-bupo rollouts show runs/demo --step 0,9 --html rollouts.html",
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", help="a run_dir")
    parser.add_argument("--step", metavar="N,...|last|all", default="last", help="counted from 0")
    parser.add_argument("--prompt", metavar="N", type=int, help="its row in the data set")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--worst", metavar="K", type=count, help="those of the K lowest rewards")
    some.add_argument("--best", metavar="K", type=count, help="those of the K highest rewards")
    some.add_argument("--html", metavar="FILE", help="write a page, which sorts and filters itself")
    parser.add_argument("--limit", metavar="K", type=count, default=32, help="at most K of a step")
    parser.add_argument(
        "--strategic-grams", metavar="FILE", help="mark planning tokens: as hicra.grams"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: that of the run")


def _add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "report",
        help="one run or several side by side, as a page and figures",
        description="Write report.html and figures/*.png of what runs have logged so far, finished "
        "or not: what they are and differ in, results, curves with their phases, probes, the split "
        "of time, and any metric.",
        epilog="example: megatron-bupo report runs/bupo-* runs/grpo-* --group-seeds",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run_dir")
    parser.add_argument(
        "--out", metavar="DIR", help="default: RUN/report; of several, beside the first"
    )
    parser.add_argument("--names", metavar="A,B,...", help="what to call them, in order")
    parser.add_argument(
        "--group-seeds",
        action="store_true",
        help="draw runs that differ only by their seed as a mean with its 95 %% interval",
    )


def _add_bed(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "bed",
        help="make the tiny reasoning model and data of the demo",
        description="Make the chain-sum bed: a base model, training and held-out prompts.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where it goes")


def _add_policy(parser: Parser, *, action: str, default: str | None) -> None:
    several = "; repeatable" if action == "append" else ""
    parser.add_argument(
        "--policy",
        metavar="full|layer=N",
        action=action,
        default=default,
        help=f"layers count from 1{several}",
    )
    parser.add_argument(
        "--read-out-norm",
        action="store_true",
        help="apply the final norm before unembedding an internal layer",
    )
