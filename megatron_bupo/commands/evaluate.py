"""`megatron-bupo eval`: how good is a model on a suite of benchmarks? Avg@k and Pass@k.

A suite is a YAML file of settings like any other, whose `evaluation.benchmarks` names data sets;
what it says of a trainer is left aside, so a training run's recipe is one, too. Everything that can
be wrong is found here, before a model loads or a server starts.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.evaluation_rules import benchmarks_of, max_response_tokens
from megatron_bupo.config.schema import BupoConfig, DebugConfig, ParallelConfig
from megatron_bupo.config.server_rules import check_servers
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.evaluation.identity import state_of, take_up
from megatron_bupo.evaluation.sheets import go_on, sheet_file
from megatron_bupo.evaluation.tables import paper_model
from megatron_bupo.launch.local import (
    RankFailed,
    Terminated,
    is_first_rank,
    run_ranks,
    under_torchrun,
)
from megatron_bupo.launch.lock import hold
from megatron_bupo.preflight import Preflight, check_model, check_vocabulary
from megatron_bupo.rewards.terms import check_terms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_bupo.evaluation.asking import Benchmark

FOLDER = "runs/eval"
EXPORTED = "hf"  # where a training run leaves its model


@dataclass(frozen=True)
class Evaluation:
    """Everything that evaluating needs."""

    ready: Preflight
    tokenizer: PreTrainedTokenizerBase
    benchmarks: Sequence[Benchmark]
    model: str  # what it is called in tables
    beside: str | None  # the paper's model whose rows stand below
    out: Path


def run(args: Namespace) -> None:
    """Ask what has not been asked yet, and write and show what came of it."""
    evaluation = read_evaluation(args)
    from megatron_bupo.evaluate import evaluate

    ready, out = evaluation.ready, evaluation.out
    with hold(out, key="--out ") if is_first_rank() else nullcontext():
        now = None
        if is_first_rank():
            now = take_up(out, state_of(ready.config, evaluation.benchmarks))
        try:
            run_ranks(evaluate, ready.layout.world, evaluation, now)
        except (KeyboardInterrupt, Terminated, RankFailed, RunStopped) as error:
            error.add_note(way_on(evaluation))
            raise


def way_on(evaluation: Evaluation) -> str:
    """What the same command would do after this one has been stopped."""
    for benchmark in evaluation.benchmarks:
        done = len(go_on(sheet_file(evaluation.out, benchmark.name), benchmark))
        if done < len(benchmark.prompts):
            question = f"question {done + 1} of {len(benchmark.prompts)} of {benchmark.name}"
            return f"stopped; the same command goes on at {question}"
    return "stopped; the same command goes on with the tables"


def read_evaluation(args: Namespace) -> Evaluation:
    """The command line with the files that it names, checked."""
    config = _config(args)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    layout = check(config, world_size, training=False)
    if not benchmarks_of(config):
        way_out = "name a suite (--suite FILE), or set evaluation.benchmarks"
        raise InputError("evaluation.benchmarks", "there is nothing to evaluate on", way_out)
    architecture = check_model(config, training=False)
    check_vocabulary(config, architecture)
    check_terms(config.reward, max_response_tokens(config))
    model = _model_name(config)
    beside = paper_model(args.beside, model)
    check_servers(config, layout.world)
    tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
    from megatron_bupo.engines import benchmarks

    asked = benchmarks(config, tokenizer)
    for benchmark in asked:
        _check_room(benchmark, config, architecture.max_positions)
    ready = Preflight(config, architecture, layout)
    return Evaluation(ready, tokenizer, asked, model, beside, _out(args, model))


def _config(args: Namespace) -> Config:
    """The settings, less those of training: a recipe's layout is its trainer's, and nobody trains
    meanwhile, or has to go on with some of the responses.
    """
    named = [f"model.path={json.dumps(_exported(args.model))}"] if args.model else []
    config = load_config(args.suite, [*named, *args.overrides])
    return replace(
        config,
        rollout=replace(
            config.rollout,
            colocated=False,
            max_staleness=0,
            step_budget_s=None,
            step_budget_tokens=None,
        ),
        parallel=ParallelConfig(),
        bupo=BupoConfig(),
        debug=DebugConfig(),
        megatron={},
    )


def _check_room(benchmark: Benchmark, config: Config, positions: int) -> None:
    """The model can read each question and answer it."""
    longest = max(len(prompt.input_ids) for prompt in benchmark.prompts)
    room = positions - (2 if config.rollout.engine == "sglang" else 0)  # see rollout/client.py
    if longest + max_response_tokens(config) > room:
        section = "rollout" if config.evaluation.max_response_tokens is None else "evaluation"
        raise InputError(
            f"{section}.max_response_tokens={max_response_tokens(config)}",
            f"{benchmark.name} has a question of {longest} tokens, and the model {room} positions",
            f"choose evaluation.max_response_tokens={room - longest}"
            if longest < room
            else "choose another model",
        )


def _exported(model: str) -> str:
    """`model`, or the HF directory that a training run with this run_dir has left."""
    folder = Path(expand(model))
    left = folder / EXPORTED
    if (left / "config.json").exists() and not (folder / "config.json").exists():
        return str(left)
    return model


def _model_name(config: Config) -> str:
    folder = Path(expand(config.model.path)).resolve()
    return folder.parent.name if folder.name == EXPORTED else folder.name


def _out(args: Namespace, model: str) -> Path:
    """Where answers and results go; by default, named after the model and the suite."""
    if args.out:
        return Path(expand(args.out))
    suite = f"-{Path(args.suite).stem}" if args.suite else ""
    return Path(FOLDER) / f"{model}{suite}"
