from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.policy_loss import clipped_policy_loss

CLIPS: list[dict[str, Any]] = [
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None},
    {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 3.0},
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 10.0},
]


def _tokens(count: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages, weights: ratios from 1/20 to 20, both signs."""
    old = -3 * torch.rand(count)
    logprobs = old + torch.linspace(-3, 3, count)[torch.randperm(count)]
    return logprobs, old, torch.randn(count), torch.rand(count) / count


def _one_token(
    logprob: float, old: float, advantage: float, clip_low: float, clip_high: float, dual: Any
) -> tuple[float, float, str]:
    """Loss of one token, its derivative by the log-prob, and what became of the token."""
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        if ratio > 1 + clip_high:
            return -advantage * (1 + clip_high), 0.0, "clipped"
    else:
        if ratio < 1 - clip_low:
            return -advantage * (1 - clip_low), 0.0, "clipped"
        if dual is not None and ratio > dual:
            return -advantage * dual, 0.0, "dual"
    return -advantage * ratio, -advantage * ratio, "free"


@pytest.mark.parametrize("clip", CLIPS)
def test_loss_gradient_and_counts_equal_a_loop_over_tokens(clip: dict[str, Any]):
    logprobs, old, advantages, weights = _tokens()
    logprobs.requires_grad_()
    loss, statistics = clipped_policy_loss(logprobs, old, advantages, weights, **clip)
    loss.backward()
    rows = [
        _one_token(p, o, a, clip["clip_low"], clip["clip_high"], clip["dual_clip"])
        for p, o, a in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True)
    ]
    fates = [fate for _, _, fate in rows]
    assert fates.count("clipped") > 100
    assert (fates.count("dual") > 10) == (clip["dual_clip"] is not None)
    expected = sum(w * value for w, (value, _, _) in zip(weights.tolist(), rows, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logprobs.grad is not None
    slopes = [w * slope for w, (_, slope, _) in zip(weights.tolist(), rows, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)
    ratios = [math.exp(p - o) for p, o in zip(logprobs.tolist(), old.tolist(), strict=True)]
    kl = sum(r - 1 - math.log(r) for r in ratios)
    assert statistics.stacked().tolist() == pytest.approx(
        [len(rows), sum(ratios), fates.count("clipped"), fates.count("dual"), kl], rel=1e-5
    )


def test_on_policy_the_gradient_is_the_plain_policy_gradient():
    logprobs, _, advantages, weights = _tokens()
    logprobs.requires_grad_()
    loss, statistics = clipped_policy_loss(
        logprobs, logprobs.detach(), advantages, weights, clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages * weights)
    assert float(statistics.clipped) == float(statistics.clipped_dual) == 0
    assert float(statistics.kl) == pytest.approx(0, abs=1e-6)


def test_ratios_beyond_the_exponent_limit_stay_finite_and_pull_nothing():
    logprobs = torch.tensor([0.0, -90.0], requires_grad=True)
    old = torch.tensor([-90.0, 0.0])
    loss, _ = clipped_policy_loss(
        logprobs, old, torch.tensor([-1.0, 1.0]), torch.ones(2), clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert logprobs.grad is not None
    assert loss.item() == pytest.approx(math.exp(20) - math.exp(-20), rel=1e-5)
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_no_tokens_cost_nothing():
    nothing = torch.zeros(0, requires_grad=True)
    loss, statistics = clipped_policy_loss(
        nothing, nothing, nothing, nothing, clip_low=0.2, clip_high=0.2, dual_clip=10.0
    )
    loss.backward()
    assert loss.item() == 0
    assert not statistics.stacked().any()
