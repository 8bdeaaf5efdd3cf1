"""`megatron-bupo generate`: what does a policy answer, and how well? Any policy, not only the full.

Everything that can be wrong with the command line, its files and its prompts is found here, before
a model loads or a server starts.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.commands.score import read_policy
from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.schema import BupoConfig, ParallelConfig
from megatron_bupo.config.server_rules import check_servers
from megatron_bupo.data.prompts import as_prompts, load_prompts
from megatron_bupo.data.rows import Row
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import InputError
from megatron_bupo.launch.local import run_ranks, under_torchrun
from megatron_bupo.preflight import Preflight, check_model, check_vocabulary
from megatron_bupo.rewards.terms import check_terms
from megatron_bupo.rollout.reading import check_prompt
from megatron_bupo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """Everything that generating needs."""

    ready: Preflight
    tokenizer: PreTrainedTokenizerBase
    prompts: tuple[Prompt, ...]
    policies: tuple[Policy, ...]
    grades: bool  # are responses graded?
    out: Path | None  # where all of them are written


def run(args: Namespace) -> None:
    """Answer the prompts under each `--policy`."""
    generation = read_generation(args)
    from megatron_bupo.generate import generate

    run_ranks(generate, generation.ready.layout.world, generation)


def read_generation(args: Namespace) -> Generation:
    """The command line with the files that it names, checked."""
    if args.prompt and args.data:
        raise InputError("--prompt and --data", "both name prompts", "give one of them")
    if not (args.prompt or args.data):
        raise InputError("--prompt, --data", "there are no prompts", "give one of them")
    if args.prompt and args.grade:
        reason = "a prompt from the command line has no answer to grade by"
        raise InputError("--grade with --prompt", reason, "give --data, whose rows have answers")
    config = _config(args)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    layout = check(config, world_size, training=False)
    architecture = check_model(config, training=False)
    policies = read_policies(args.policy, architecture.layers, read_out_norm=args.read_out_norm)
    check_vocabulary(config, architecture)
    if args.grade:
        check_terms(config.reward, config.rollout.max_response_tokens)
    out = Path(expand(args.out)) if args.out else None
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {args.out}", f"{out.parent} is not a directory", "make it first")
    tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
    prompts = _prompts(args, config, tokenizer)
    for prompt in prompts:
        check_prompt(
            prompt,
            context=architecture.max_positions,
            vocab_size=architecture.vocab_size,
            max_response_tokens=config.rollout.max_response_tokens,
        )
    if config.rollout.engine == "sglang" and policies != (FULL,):
        from megatron_bupo.rollout.internal_policies import serving_internal_policies

        config = serving_internal_policies(config)
    check_servers(config, layout.world)
    ready = Preflight(config, architecture, layout)
    return Generation(ready, tokenizer, prompts, policies, args.grade, out)


def read_policies(
    texts: list[str] | None, layers: int, *, read_out_norm: bool
) -> tuple[Policy, ...]:
    """Each of `--policy` once, in order; none is the full one. The norm says nothing to it."""
    named = texts or ["full"]
    normed = read_out_norm and set(named) != {"full"}
    if read_out_norm and not normed:
        read_policy("full", layers, read_out_norm=True)  # says why not
    policies = (read_policy(t, layers, read_out_norm=normed and t != "full") for t in named)
    return tuple(dict.fromkeys(policies))


def _config(args: Namespace) -> Config:
    """The settings, less those of training: a recipe's layout is its trainer's."""
    named = [f"model.path={json.dumps(args.model)}"] if args.model else []
    config = load_config(args.config, [*named, *args.overrides])
    return replace(config, parallel=ParallelConfig(), bupo=BupoConfig(), megatron={})


def _prompts(
    args: Namespace, config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[Prompt, ...]:
    if args.data:
        prompts = load_prompts(args.data, config.data, tokenizer, answers=args.grade)
    else:
        texts = enumerate(args.prompt)
        rows = [
            Row(i, f"--prompt {text!r}", {config.data.prompt_column or "prompt": text})
            for i, text in texts
        ]
        prompts = as_prompts(rows, "the command line", config.data, tokenizer, answers=False)
    return tuple(prompts)
