"""Log-probs and entropies of given responses, under any policy and layout: what debugging and
tests compare with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.commands.score import GivenResponse, Scoring
from megatron_bupo.config import expand
from megatron_bupo.durable import replacing
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.types import TokenBatch

AT_ONCE = 64  # responses per data-parallel rank; bounds what is held between passes


def score(scoring: Scoring) -> None:
    """Write `{"logprobs": [...], "entropies": [...]}` for each response, in order. Every rank runs
    this.

    fp32 nats, one number per response token; an entropy is that of the distribution its token was
    drawn from.
    """
    ready = scoring.ready
    with parallel.joined(ready.layout, seed=ready.config.seed):
        with ExitStack() as files:
            index = read_index(expand(ready.config.model.path))
            actor = MegatronActor(ready.architecture, ready.config, slice_opener(index, files))
        at_once = AT_ONCE * ready.layout.dp
        rows = scored_rows(actor, scoring.responses, scoring.policy, at_once)
        if dist.get_rank() == 0:
            with replacing(scoring.out) as file:
                file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
        for _ in rows:
            pass  # the other ranks' part of the passes
        dist.barrier()


def scored_rows(
    actor: MegatronActor, responses: Sequence[GivenResponse], policy: Policy, at_once: int
) -> Iterator[dict[str, list[float]]]:
    """A row per response, `at_once` of them in flight."""
    for start in range(0, len(responses), at_once):
        batch = as_batch(responses[start : start + at_once])
        logprobs, entropies = actor.logprobs(batch, policy)
        for i, mask in enumerate(batch.response_mask):
            yield {
                "logprobs": logprobs[i][mask].tolist(),
                "entropies": entropies[i][mask].tolist(),
            }


def as_batch(responses: Sequence[GivenResponse]) -> TokenBatch:
    """Given responses as tensors; nothing is known of who sampled them."""
    ids = pad_sequence([torch.tensor(r.input_ids) for r in responses], batch_first=True)
    place = torch.arange(ids.shape[1])
    begins = torch.tensor([[r.prompt_length] for r in responses])
    ends = torch.tensor([[len(r.input_ids)] for r in responses])
    nothing = torch.zeros(ids.shape)
    return TokenBatch(ids, (begins <= place) & (place < ends), nothing, nothing)
