"""Responses dealt out to data-parallel ranks and micro-batches by their tokens, and packed.

Every micro-batch is one row of sequences laid end to end. A response's last token is never an
input, for nothing is predicted from it; a response without a token to learn from is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bupo.mcore.packed import PackedRow, Packing, Split
from megatron_bupo.types import TokenBatch


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of this rank. A response token t is predicted at position t - 1: that is its
    row of hidden states.
    """

    input_ids: Tensor  # [1, tokens]
    padding: Tensor  # [1, tokens], true where a token belongs to no response
    packed: PackedRow
    # all [response tokens predicted on this rank]:
    rows: Tensor  # places in [tokens]: where they are predicted
    at: Tensor  # flat indices into the batch's [responses, tokens]: where they stand
    targets: Tensor  # their ids


def input_lengths(batch: TokenBatch) -> list[int]:
    """Tokens of each response, its prompt included, that something is predicted from."""
    if bool(batch.response_mask[:, 0].any()):
        raise ValueError("a response token at position 0 has nothing to be predicted from")
    last = torch.arange(batch.response_mask.shape[1]) * batch.response_mask
    return last.max(dim=1).values.tolist()


def deal(
    lengths: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    max_responses: int | None = None,
    at_least: int = 1,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """`[rank][micro-batch]` -> indices of responses, longest first.

    All ranks get the same number of micro-batches, at least `at_least` and a multiple of
    `multiple`, as few as `max_tokens` and `max_responses` allow (a response longer than
    `max_tokens` is alone). Tokens are balanced: each response, longest first, goes where the fewest
    tokens are. Empty micro-batches may remain: they change no number.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    count = max(at_least, -(-sum(lengths) // (ranks * max_tokens)))
    if max_responses is not None:
        count = max(count, -(-len(order) // (ranks * max_responses)))
    while True:
        count = -(-count // multiple) * multiple
        bins = _balanced(order, lengths, ranks * count, max_responses)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= max_tokens for b in bins):
            break
        count += 1
    bins.sort(key=lambda b: -sum(lengths[i] for i in b))
    rounds = [bins[first : first + ranks] for first in range(0, len(bins), ranks)]
    return [
        [dealt[-1 - rank if i % 2 else rank] for i, dealt in enumerate(rounds)]
        for rank in range(ranks)
    ]


def _balanced(
    order: Sequence[int], lengths: Sequence[int], count: int, max_responses: int | None
) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, place) for place in range(count)]
    for i in order:
        tokens, place = heapq.heappop(lightest)
        bins[place].append(i)
        if max_responses is None or len(bins[place]) < max_responses:
            heapq.heappush(lightest, (tokens + lengths[i], place))
    return bins


def cut(
    batch: TokenBatch,
    dealt: Sequence[Sequence[int]],
    *,
    split: Split,
    equal: bool,
    device: torch.device,
) -> list[Microbatch]:
    """The micro-batches of this data-parallel rank, `dealt[rank]` of `deal`'s answer.

    `equal` rows are as long as the longest one, for pipelines that send tensors of one shape.
    """
    lengths = input_lengths(batch)
    sizes = [split.tokens([lengths[i] for i in responses]) for responses in dealt]
    if equal:
        sizes = [max(sizes)] * len(sizes)
    return [
        _pack(batch, responses, Packing([lengths[i] for i in responses], tokens, split), device)
        for responses, tokens in zip(dealt, sizes, strict=True)
    ]


def _pack(
    batch: TokenBatch, responses: Sequence[int], packing: Packing, device: torch.device
) -> Microbatch:
    width = batch.input_ids.shape[1]
    lengths, long = input_lengths(batch), torch.long
    ends = torch.tensor([lengths[i] for i in responses], dtype=long).repeat_interleave(
        torch.tensor(packing.lengths, dtype=long)
    )
    sequences = [
        F.pad(batch.input_ids[i, :size], (0, max(0, size - width)))
        for i, size in zip(responses, packing.lengths, strict=True)
    ]
    ids = torch.cat([batch.input_ids.new_zeros(0), *sequences])
    chosen = torch.tensor(responses, dtype=long)
    sequence, token = batch.response_mask[chosen].nonzero(as_tuple=True)
    here, rows = packing.locate(sequence, token - 1)
    response, token = chosen[sequence[here]], token[here]
    return Microbatch(
        input_ids=packing.scatter(ids).unsqueeze(0).to(device),
        padding=~packing.scatter(packing.position < ends).unsqueeze(0).to(device),
        packed=packing.row(device),
        rows=rows[here].to(device),
        at=(response * width + token).to(device),
        targets=batch.input_ids[response, token].to(device),
    )
