"""What two checkpoints compute: log-probs of the whole vocabulary on the same random tokens.

transformers computes an HF directory, Megatron-Core a torch_dist one, with the weights that its own
loader finds: an error that both of our ways of reading share shows here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.hf.tensors import check_tensors, check_tied, read_index
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.verification.sides import Side


@dataclass(frozen=True)
class Question:
    """What both models are asked: `[sequences, tokens]` ids; and how far apart they may be."""

    input_ids: Tensor
    tolerance: float
    config: Config  # of the Megatron side
    layout: Layout


@dataclass(frozen=True)
class Computed:
    """How far the log-probs of the two are apart."""

    largest_nats: float
    largest_relative: float  # to the largest log-prob of the position, where that is above 1 nat
    tolerance: float  # of the relative one
    positions: int


def not_computable(first: Side, second: Side) -> Iterator[str]:
    """Why the models cannot both be asked the same, if so."""
    for side in (first, second):
        if side.torch_dist is None:
            try:
                index = read_index(side.path)
                check_tensors(side.architecture, index)
                check_tied(side.architecture, index)
            except InputError as error:
                yield str(error)
        elif not side.torch_dist.whole:
            yield f"{side.path} holds the lower layers alone, and Megatron-Core loads whole models"
    sizes = [side.architecture.vocab_size for side in (first, second)]
    if sizes[0] != sizes[1]:
        yield f"the vocabularies have {sizes[0]} and {sizes[1]} tokens"


def compared_logprobs(first: Side, second: Side, question: Question) -> Computed:
    """Both models' log-probs of every token at every position but the last.

    fp32 rounds in proportion to the numbers that it adds up, and each position's logits are such
    sums: the tolerance is relative to the position's largest log-prob.
    """
    # Ranks are forked, and must be before this process has threads of its own.
    by_ranks = {
        id(side): megatron_logprobs(side, question)
        for side in (first, second)
        if side.torch_dist is not None
    }
    a, b = (
        by_ranks[id(side)] if id(side) in by_ranks else transformers_logprobs(side, question)
        for side in (first, second)
    )
    gap = (a - b).abs().nan_to_num(math.inf, math.inf)
    scale = torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True).clamp(min=1.0)
    relative = (gap / scale).nan_to_num(math.inf, math.inf)
    return Computed(float(gap.max()), float(relative.max()), question.tolerance, a[..., 0].numel())


@torch.no_grad()
def transformers_logprobs(side: Side, question: Question) -> Tensor:
    """`[sequences, tokens - 1, vocab]`, fp32 nats, attention without fused kernels."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            side.path, dtype=torch.float32, attn_implementation="eager"
        )
    except Exception as error:  # of every kind, depending on what it does not like
        reason = f"transformers cannot load it ({type(error).__name__}: {error})"
        raise InputError(str(side.path), reason, "restore it, or give --no-logits") from error
    logits = [model(row[None]).logits[0, :-1] for row in question.input_ids]
    return torch.stack(logits).float().log_softmax(-1)


def megatron_logprobs(side: Side, question: Question) -> Tensor:
    """`[sequences, tokens - 1, vocab]`, fp32 nats, from the ranks of the layout."""
    from megatron_bupo.mcore.whole_vocabulary import Reading, write_logprobs

    assert side.torch_dist is not None, "Megatron-Core reads torch_dist checkpoints"
    ids, vocab = question.input_ids, side.architecture.vocab_size
    out = torch.full((ids.numel(), vocab), torch.nan)
    with tempfile.TemporaryDirectory() as folder:
        reading = Reading(
            layout=question.layout,
            config=question.config,
            architecture=side.architecture,
            path=side.torch_dist.path,
            stacked=side.torch_dist.stacked,
            input_ids=ids,
            out=Path(folder),
        )
        run_ranks(write_logprobs, question.layout.world, reading)
        for file in Path(folder).iterdir():
            found = load_file(file)
            out[found["at"]] = found["logprobs"]
    return out.view(*ids.shape, vocab)[:, 1:]
