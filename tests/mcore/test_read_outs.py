from __future__ import annotations

import math

import pytest
import torch

from megatron_bupo.mcore.logprobs import VocabShard
from megatron_bupo.mcore.read_outs import ReadOuts
from tests.ranks import run_ranks

HIDDEN, TOKENS = 8, 5


def read(weight: torch.Tensor, vectors: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """`[4, vectors, tokens]`, the last vector being the full policy's."""
    outs = ReadOuts(weight, shard, vectors=len(vectors), rows=len(vectors) * TOKENS)
    with outs.at_work():
        full = outs.yardstick(vectors[-1], torch.zeros(TOKENS, dtype=torch.long))
        return outs.whole(outs.read(vectors, full, compared=len(vectors)), full)


def test_policies_that_know_nothing_have_the_logarithm_of_the_vocabulary():
    vectors = torch.randn(3, TOKENS, HIDDEN)
    vectors[0] = 0
    weight = torch.zeros(67, HIDDEN)
    found = read(weight, vectors, VocabShard(0, 67, None))
    expected = torch.tensor([math.log(67), 0.0, 0.0, 1.0])  # ties agree
    assert torch.allclose(found, expected.view(4, 1, 1).expand_as(found), atol=1e-6)
    found = read(torch.randn(67, HIDDEN), vectors, VocabShard(0, 67, None))
    assert found[0, 0].tolist() == pytest.approx([math.log(67)] * TOKENS)


def test_a_policy_agrees_with_itself():
    vectors = torch.randn(1, TOKENS, HIDDEN).expand(2, -1, -1)
    found = read(4 * torch.randn(67, HIDDEN), vectors, VocabShard(0, 67, None))
    assert found[1:3].abs().max() < 1e-5
    assert found[3].eq(1).all()


def test_padding_is_no_part_of_the_vocabulary():
    weight, vectors = torch.randn(67, HIDDEN), torch.randn(3, TOKENS, HIDDEN)
    padded = torch.cat((weight, 9 * torch.randn(5, HIDDEN)))
    expected = read(weight, vectors, VocabShard(0, 67, None))
    found = read(padded, vectors, VocabShard(0, 67, None))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_rank_may_hold_nothing_but_padding():
    vectors = torch.randn(3, TOKENS, HIDDEN)
    weight = torch.randn(3, HIDDEN)  # of a vocabulary of 3, cut for two ranks
    expected = read(weight, vectors, VocabShard(0, 3, None))
    for found in run_ranks(2, _read_shard, weight, vectors):
        assert torch.allclose(found, expected, atol=1e-5)


def _read_shard(weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    group = torch.distributed.group.WORLD
    if torch.distributed.get_rank() == 0:
        return read(weight, vectors, VocabShard(0, 3, group))
    return read(torch.zeros(3, HIDDEN), vectors, VocabShard(3, 0, group))


def test_logits_of_hundreds_overflow_nothing():
    vectors = torch.randn(3, TOKENS, HIDDEN) * torch.tensor([300.0, 30.0, 1.0]).view(3, 1, 1)
    weight = torch.randn(67, HIDDEN)
    found = read(weight, vectors, VocabShard(0, 67, None))
    log_p = (vectors.double() @ weight.double().T).log_softmax(-1)
    full = log_p[-1]
    assert torch.allclose(found[0].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-4)
    kl_from = (full.exp() * (full - log_p)).sum(-1)
    assert torch.allclose(found[2].double(), kl_from, rtol=1e-5, atol=1e-4)
