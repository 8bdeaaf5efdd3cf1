from __future__ import annotations

import math

import pytest
import torch

from megatron_bupo.algorithm.rollout_correction import truncated_importance_weights


def test_a_token_weighs_its_probability_over_the_samplers_up_to_the_cap():
    old, sampler = -3 * torch.rand(200), -3 * torch.rand(200)
    weights, cut = truncated_importance_weights(old, sampler, cap=1.5)
    exact = [math.exp(p) / math.exp(q) for p, q in zip(old.tolist(), sampler.tolist(), strict=True)]
    assert weights.tolist() == pytest.approx([min(w, 1.5) for w in exact], rel=1e-5)
    assert cut.tolist() == [w > 1.5 for w in exact]
    assert 20 < cut.sum() < 180


def test_a_token_that_the_sampler_held_impossible_weighs_the_cap_and_nothing_has_a_gradient():
    old = torch.tensor([-0.1, -400.0], requires_grad=True)
    weights, cut = truncated_importance_weights(old, torch.tensor([-400.0, -0.1]), cap=2.0)
    assert weights.tolist() == [2.0, 0.0]
    assert cut.tolist() == [True, False]
    assert not weights.requires_grad
