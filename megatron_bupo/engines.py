"""From a config to what a step's rollouts come from: prompts, seeds, an engine, ranks that share.

No Megatron here: who only samples starts without it.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_bupo.config import Config, expand
from megatron_bupo.config.evaluation_rules import benchmarks_of, max_response_tokens
from megatron_bupo.config.timeouts import COLLECTIVE_TIMEOUT_S
from megatron_bupo.data.order import PromptStream
from megatron_bupo.data.prompts import load_prompts, load_training
from megatron_bupo.errors import InputError
from megatron_bupo.evaluation.asking import Benchmark
from megatron_bupo.rollout.reading import stop_ids
from megatron_bupo.rollout.sglang import Model, SGLangEngine
from megatron_bupo.rollout.weights import StoredWeights
from megatron_bupo.types import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_bupo.hf.architecture import DecoderSizes
    from megatron_bupo.rollout.engine import RolloutEngine
    from megatron_bupo.types import Weights

TRAINING, HELD_OUT = 0, 1  # streams of sampling noise


def prompt_stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptStream:
    """What the steps of a run ask."""
    benchmarks = [benchmark.data for benchmark in config.evaluation.benchmarks]
    sources = load_training(config.data, tokenizer, benchmarks)
    return PromptStream(
        *(prompts for _, prompts in sources),
        weights=[weight for weight, _ in sources],
        prompts_per_step=config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def sampling_at(config: Config, step: int) -> Sampling:
    """How the responses of `step` are drawn."""
    rollout = config.rollout
    return Sampling(
        responses_per_prompt=rollout.responses_per_prompt,
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        seed=noise_seed(config.seed, TRAINING, step),
    )


def benchmarks(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Benchmark]:
    """What evaluation asks, the same while training and after. Each time with the same noise, to
    compare.
    """
    evaluation = config.evaluation
    # All questions or none: the score of those that a filter leaves is another benchmark's
    unfiltered = replace(config.data, max_prompt_tokens=sys.maxsize, bad_rows="refuse")
    asked = []
    for benchmark in benchmarks_of(config):
        assert benchmark.responses_per_prompt is not None
        assert benchmark.pass_at is not None
        prompts = load_prompts(benchmark.data, unfiltered, tokenizer)[: evaluation.max_prompts]
        longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
        if (tokens := len(longest.input_ids)) > config.data.max_prompt_tokens:
            raise InputError(
                f"data.max_prompt_tokens={config.data.max_prompt_tokens}",
                f"row {longest.index + 1} of {benchmark.data} has {tokens} tokens, and evaluation "
                "leaves out no question",
                f"set data.max_prompt_tokens={tokens}",
            )
        # One of its own for each benchmark, whatever others there are
        named = [zlib.crc32(benchmark.name.encode())] if evaluation.benchmarks else []
        sampling = Sampling(
            responses_per_prompt=benchmark.responses_per_prompt,
            max_response_tokens=max_response_tokens(config),
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=noise_seed(config.seed, HELD_OUT, *named),
        )
        asked.append(Benchmark(benchmark.name, prompts, sampling, benchmark.pass_at))
    return asked


def noise_seed(*keys: int) -> int:
    """A seed of its own for each `keys`."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def sharing_ranks() -> Iterator[None]:
    """Be one of the ranks that share the responses out, and hold no shards of a model; one process
    is no group. A rank that fails does not leave: see `mcore.parallel.joined`.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    yield
    dist.destroy_process_group()


def rollout_engine(
    config: Config,
    arch: DecoderSizes,
    tokenizer: PreTrainedTokenizerBase,
    *,
    run_dir: Path,
    current_weights: Callable[[], Weights] | None = None,
) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the weights of `model.path`.

    `current_weights()` are all that the trainer has, for servers that lost theirs (without a
    trainer: those of the model directory).
    """
    if config.rollout.engine == "embedded":
        from megatron_bupo.rollout.embedded import EmbeddedEngine  # seconds, for transformers

        return EmbeddedEngine(
            expand(config.model.path),
            tokenizer,
            batch_size=config.rollout.batch_size,
            dtype=getattr(torch, config.model.dtype),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    stored = partial(StoredWeights, expand(config.model.path))
    ends = stop_ids(expand(config.model.path), tokenizer)
    return SGLangEngine(
        config,
        Model(arch, tokenizer, ends),
        run_dir=run_dir,
        current_weights=current_weights or stored,
    )
