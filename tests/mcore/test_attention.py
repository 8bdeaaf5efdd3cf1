"""Attention in packed rows against a loop over sequences, heads and tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.config.layout import Layout
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.attention import PackedAttention, PackedRotary
from megatron_bupo.mcore.packed import Packing, Split
from tests.ranks import run_ranks

LENGTHS = [9, 8, 3, 1, 1]  # two rectangles of like length and one more
HEADS, SIZE, SCALE = 4, 3, 0.3


def looped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence, `[tokens, heads, head_dim]` each."""
    out = torch.zeros_like(query)
    for t in range(len(query)):
        for head in range(HEADS):
            group = head * key.shape[1] // HEADS
            scores = SCALE * key[: t + 1, group] @ query[t, head]
            out[t, head] = scores.softmax(0) @ value[: t + 1, group]
    return out


def on_a_rank(cp: int, kv_heads: int, tokens: int) -> float:
    """The largest deviation of outputs and gradients of this rank's tokens."""
    parallel.initialize(Layout(1, 1, 1, 1, cp, cp=cp), seed=0)
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    packing = Packing(LENGTHS, tokens, Split(cp=cp, rank=rank))
    config: Any = SimpleNamespace(attention_dropout=0.0)
    attention = PackedAttention(config, softmax_scale=SCALE)
    heads = (HEADS, kv_heads, kv_heads)
    whole = [torch.randn(cp * tokens, n, SIZE, requires_grad=True) for n in heads]
    pull = torch.randn(cp * tokens, HEADS, SIZE)
    expected, first = torch.zeros(cp * tokens, HEADS, SIZE), 0
    for padded in packing.lengths:
        at = packing.place[first : first + padded]
        expected = expected.index_put((at,), looped(*(x[at] for x in whole)))
        first += padded
    references = torch.autograd.grad((expected * pull).sum(), whole)
    mine = slice(rank * tokens, (rank + 1) * tokens)
    local = [x.detach()[mine].unsqueeze(1).requires_grad_() for x in whole]
    out = attention(*local, None, packed_seq_params=packing.row(torch.device("cpu")))
    assert out.shape == (tokens, 1, HEADS * SIZE)
    gaps = [out.view(tokens, HEADS, SIZE) - expected[mine]]
    grads = torch.autograd.grad((out.view(tokens, HEADS, SIZE) * pull[mine]).sum(), local)
    gaps += [g.squeeze(1) - r[mine] for g, r in zip(grads, references, strict=True)]
    return max(float(gap.detach().abs().max()) for gap in gaps)


@pytest.mark.parametrize(
    ("cp", "kv_heads", "tokens"), [(1, 1, 22), (1, 4, 27), (2, 2, 17), (3, 1, 20)]
)
def test_tokens_look_back_in_their_own_sequence_alone(cp: int, kv_heads: int, tokens: int):
    assert max(run_ranks(cp, on_a_rank, cp, kv_heads, tokens)) < 1e-6


def test_a_row_without_sequences_is_all_zeros():
    [gap] = run_ranks(1, _empty)
    assert gap == 0


def _empty() -> float:
    parallel.initialize(Layout(1, 1, 1, 1, 1), seed=0)
    config: Any = SimpleNamespace(attention_dropout=0.0)
    nothing = [torch.randn(2, 1, HEADS, SIZE, requires_grad=True) for _ in range(3)]
    row = Packing([], 2, Split()).row(torch.device("cpu"))
    out = PackedAttention(config)(*nothing, None, packed_seq_params=row)
    out.sum().backward()
    return float(out.abs().max()) if out.shape == (2, 1, HEADS * SIZE) else 1.0


def test_tokens_turn_by_their_place_in_their_sequence():
    frequencies = torch.tensor([1.0, 0.1])
    row = Packing([3, 2], 6, Split()).row(torch.device("cpu"))
    rotary = PackedRotary(frequencies)
    angles = rotary(rotary.get_rotary_seq_len(None, None, None, None, row))
    assert angles.shape == (6, 1, 1, 4)
    for place, position in enumerate([0, 1, 2, 0, 1, 0]):
        expected = torch.cat((position * frequencies, position * frequencies))
        assert torch.equal(angles[place, 0, 0], expected)
