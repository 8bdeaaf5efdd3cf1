"""Responses as tensors: one row per response, right-padded, prompt-major."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_bupo.types import RolloutGroup, TokenBatch


def pack(groups: Sequence[RolloutGroup], pad_id: int) -> TokenBatch:
    """Rollouts as one batch; log-probs of the actor and advantages come later."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rows = [(*r.prompt.input_ids, *r.response_ids) for r in rollouts]
    input_ids = pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id
    )
    ends = torch.tensor([len(row) for row in rows])[:, None]
    begins = torch.tensor([len(r.prompt.input_ids) for r in rollouts])[:, None]
    place = torch.arange(input_ids.shape[1])
    response_mask = (begins <= place) & (place < ends)
    rollout_logprobs = torch.zeros(input_ids.shape)
    rollout_logprobs[response_mask] = torch.tensor(
        [x for r in rollouts for x in r.rollout_logprobs]
    )
    return TokenBatch(
        input_ids=input_ids,
        response_mask=response_mask,
        rollout_logprobs=rollout_logprobs,
    )


def in_rounds(lengths: Sequence[int], most: int, *, first: int = 0) -> Iterator[slice]:
    """Responses of `lengths` tokens from number `first` on, in order, as many at a time as have at
    most so many tokens together; one that has more is alone.
    """
    tokens = 0
    for i in range(first, len(lengths)):
        tokens += lengths[i]
        if tokens > most and i > first:
            yield slice(first, i)
            first, tokens = i, lengths[i]
    yield slice(first, len(lengths))
