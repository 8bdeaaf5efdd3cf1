"""`megatron-bupo analyze`: what do the layers of a model think of its own responses?

Everything that can be wrong with the command line and its files is found here, before a model loads
or a server starts. What the numbers depend on is written down in `OUT/state.json`; whoever goes on
there with another model, other responses or another read-out is refused. The layout is not among
it.
"""

from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.analysis.parts import read_parts
from megatron_bupo.analysis.present import present
from megatron_bupo.commands.score import GivenResponse, read_responses
from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.schema import BupoConfig, DebugConfig
from megatron_bupo.config.server_rules import check_servers
from megatron_bupo.data.prompts import load_prompts, load_training
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.durable import partial_path, replace_text
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.evaluation.identity import digest, refuse_changes
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.launch.local import (
    RankFailed,
    Terminated,
    is_first_rank,
    run_ranks,
    under_torchrun,
)
from megatron_bupo.launch.lock import FILE as LOCK
from megatron_bupo.launch.lock import hold
from megatron_bupo.preflight import Preflight, check_model, check_vocabulary
from megatron_bupo.record.heartbeat import FOLDER as RANKS
from megatron_bupo.rollout.reading import check_prompt
from megatron_bupo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE, SAMPLED = "state.json", "responses.jsonl"
# What the numbers hang on beside model and responses
SAME_SAMPLING = "seed rollout.engine rollout.max_response_tokens"


@dataclass(frozen=True)
class Analysis:
    """Everything that analysing needs: responses, or prompts to sample them by."""

    ready: Preflight
    architecture: Architecture
    responses: tuple[GivenResponse, ...] | None
    prompts: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase | None
    source: str  # the file that responses or prompts are from
    normed: bool
    per_token: bool
    lens_responses: int  # whose tokens the report goes through
    out: Path
    settings: Mapping[str, Any]  # the first rank's alone: to know them is to read the whole model


def run(args: Namespace) -> None:
    """Sample what is to be sampled, read what has not been read, and write what came of it; without
    a model: draw what came of it again.
    """
    if args.model is None:
        _draw_again(args)
        return
    carry_out(read_analysis(args))


def carry_out(analysis: Analysis, *, stay: bool = False) -> None:
    """Start the ranks that do it, or be one of them; `stay`: one that then goes on to train."""
    if is_first_rank():
        _check_out(analysis.out)
    from megatron_bupo.analyze import analyze

    with hold(analysis.out, key="--out ") if is_first_rank() else nullcontext():
        if is_first_rank():
            take_up(analysis)
        try:
            run_ranks(partial(analyze, stay=stay), analysis.ready.layout.world, analysis)
        except (KeyboardInterrupt, Terminated, RankFailed, RunStopped) as error:
            error.add_note("stopped; the same command goes on where it was")
            raise


def _draw_again(args: Namespace) -> None:
    """Figures and report of a finished `--out`, from the files in it alone."""
    given = "--data" if args.data else "--responses" if args.responses else " ".join(args.overrides)
    if given:
        reason = "there is no model to read, and drawing --out again needs neither"
        raise InputError(given, reason, "give --model, or --out alone")
    out = Path(expand(args.out))
    for path in present(out):
        print(path)


def read_analysis(args: Namespace) -> Analysis:
    """The command line with the files that it names, checked."""
    if bool(args.data) == bool(args.responses):
        reason = "both name what to read" if args.data else "there is nothing to read"
        way_out = "give prompts (--data) or responses (--responses)"
        raise InputError("--data, --responses", reason, way_out)
    return analysis_of(args, _config(args))


def analysis_of(args: Namespace, config: Config) -> Analysis:
    """The analysis that `args` ask for under `config`, whose prompts or responses are read."""
    config = _without_training(config)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    layout = check(config, world_size, training=False)
    architecture = check_model(config, training=False)
    if not isinstance(architecture, Architecture):
        where = f"model.path={config.model.path}"
        reason = "its architecture comes through Megatron-Bridge, and what its layers add up to"
        raise InputError(where, f"{reason} is not known", "analyze Llama, Qwen2 and Qwen3 models")
    if config.megatron:
        from megatron_bupo.mcore.native import check_native

        check_native(config.megatron)
    ready = Preflight(config, architecture, layout)
    responses, prompts, tokenizer = None, (), None
    if args.responses:
        responses = _responses(Path(expand(args.responses)), architecture)
    else:
        check_servers(config, layout.world)
        check_vocabulary(config, architecture)
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        prompts = _prompts(args, config, architecture, tokenizer)
    normed = args.read_out == "norm"
    return Analysis(
        ready,
        architecture,
        responses,
        prompts,
        tokenizer,
        Path(args.responses or args.data or "training prompts").name,
        normed,
        args.per_token,
        args.lens_responses,
        Path(expand(args.out)),
        _settings(args, config, responses, prompts) if is_first_rank() else {},
    )


def _config(args: Namespace) -> Config:
    """The settings of a command line."""
    config = load_config(None, [f"model.path={json.dumps(args.model)}", *args.overrides])
    for key in ("temperature", "top_p"):
        if (value := getattr(config.rollout, key)) != 1:
            reason = "what is read are the distributions that responses are drawn from"
            raise InputError(f"rollout.{key}={value}", reason, f"leave rollout.{key} at 1")
    return config


def _without_training(config: Config) -> Config:
    """`config` less what is about training: nobody trains meanwhile."""
    rollout = replace(
        config.rollout,
        temperature=1.0,
        top_p=1.0,
        colocated=False,
        max_staleness=0,
        step_budget_s=None,
        step_budget_tokens=None,
    )
    return replace(config, rollout=rollout, bupo=BupoConfig(), debug=DebugConfig())


def _responses(path: Path, architecture: Architecture) -> tuple[GivenResponse, ...]:
    responses = read_responses(path, architecture)
    for number, response in enumerate(responses, start=1):
        if len(response.input_ids) == response.prompt_length:
            where = f"{path}: row {number}"
            raise InputError(where, "its response is empty", "leave the row out")
    return responses


def _prompts(
    args: Namespace,
    config: Config,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Prompt, ...]:
    if args.data is None:  # those of training, from all over the data
        benchmarks = [benchmark.data for benchmark in config.evaluation.benchmarks]
        parts = load_training(config.data, tokenizer, benchmarks)
        every = [prompt for _, part in parts for prompt in part]
        prompts = every[:: max(1, len(every) // args.prompts)][: args.prompts]
    else:
        prompts = load_prompts(args.data, config.data, tokenizer, answers=False)[: args.prompts]
    for prompt in prompts:
        check_prompt(
            prompt,
            context=architecture.max_positions,
            vocab_size=architecture.vocab_size,
            max_response_tokens=config.rollout.max_response_tokens,
        )
    return tuple(prompts)


def _settings(
    args: Namespace,
    config: Config,
    responses: Sequence[GivenResponse] | None,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """What the numbers depend on. Reads all of the model's files."""
    settings: dict[str, Any] = {
        **files_of(Path(expand(config.model.path))),
        "model.dtype": config.model.dtype,
        "--read-out": args.read_out,
        "--per-token": args.per_token,
    }
    if responses is not None:
        return settings | {"responses": _ids([[r.input_ids, r.prompt_length] for r in responses])}
    sampling = {
        "seed": config.seed,
        "rollout.engine": config.rollout.engine,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
    }
    return settings | sampling | {"prompts": _ids([prompt.input_ids for prompt in prompts])}


def files_of(model: Path) -> dict[str, str]:
    """What the model's files hold. Reads all of them."""
    return {
        "model weights": digest({tensor.file for tensor in read_index(model).tensors.values()}),
        "model config.json": digest([model / "config.json"]),
    }


def _ids(rows: Sequence[Any]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def _check_out(out: Path) -> None:
    """It is a directory of an analysis, or can become one."""
    where = f"--out {out}"
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(where, "is not a directory", "choose another one")
    if not out.exists() or (out / STATE).exists():
        return
    # What a kill leaves at the very beginning, or a rank of torchrun's that is ahead of this one
    ours = {LOCK, RANKS, partial_path(out / STATE).name}
    if others := sorted({path.name for path in out.iterdir()} - ours):
        reason = f"holds {others[0]}, and no analysis"
        raise InputError(where, reason, "choose a directory that is new or empty")


def take_up(analysis: Analysis) -> None:
    """Make `--out` the directory of this analysis, or check that it is."""
    path = analysis.out / STATE
    if not path.exists():
        replace_text(path, json.dumps(analysis.settings, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(str(path), f"cannot be read ({error})", "choose another --out") from None
    refuse_changes("its analysis was begun with", before, analysis.settings, analysis.out)
    if analysis.responses is not None:
        read_parts(analysis.out, response_lengths(analysis.responses))


def response_lengths(responses: Sequence[GivenResponse]) -> list[int]:
    """Tokens of each response."""
    return [len(response.input_ids) - response.prompt_length for response in responses]
