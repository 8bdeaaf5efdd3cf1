from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.policy_loss import policy_loss

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
    logprob: float, ratio: float, advantage: float, kind: str, clip: dict[str, Any]
) -> tuple[float, float, str]:
    """Loss of one token, its derivative by the log-prob, and what became of the token."""
    low, high, dual = 1 - clip["clip_low"], 1 + clip["clip_high"], clip["dual_clip"]
    if kind == "unclipped":
        return -advantage * ratio, -advantage * ratio, "free"
    if kind == "cispo":
        weight = min(max(ratio, low), high)
        fate = "free" if low <= ratio <= high else "clipped"
        return -weight * advantage * logprob, -weight * advantage, fate
    if advantage >= 0:
        if ratio > high:
            return -advantage * high, 0.0, "clipped"
    else:
        if ratio < low:
            return -advantage * low, 0.0, "clipped"
        if dual is not None and ratio > dual:
            return -advantage * dual, 0.0, "dual"
    return -advantage * ratio, -advantage * ratio, "free"


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", ["clipped", "cispo", "unclipped"])
def test_loss_gradient_and_counts_equal_a_loop_over_tokens(kind: str, clip: dict[str, Any]):
    logprobs, old, advantages, weights = _tokens()
    logprobs.requires_grad_()
    loss, statistics = policy_loss(logprobs, old, advantages, weights, kind=kind, **clip)
    loss.backward()
    ratios = [math.exp(p - o) for p, o in zip(logprobs.tolist(), old.tolist(), strict=True)]
    rows = [
        _one_token(p, r, a, kind, clip)
        for p, r, a in zip(logprobs.tolist(), ratios, advantages.tolist(), strict=True)
    ]
    fates = [fate for _, _, fate in rows]
    assert (fates.count("clipped") > 100) == (kind != "unclipped")
    dual = kind == "clipped" and clip["dual_clip"] is not None
    assert (fates.count("dual") > 10) == dual
    expected = sum(w * value for w, (value, _, _) in zip(weights.tolist(), rows, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logprobs.grad is not None
    slopes = [w * slope for w, (_, slope, _) in zip(weights.tolist(), rows, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)
    kl = sum(r - 1 - math.log(r) for r in ratios)
    assert statistics.stacked().tolist() == pytest.approx(
        [len(rows), sum(ratios), fates.count("clipped"), fates.count("dual"), kl], rel=1e-5
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
@pytest.mark.parametrize("clip", CLIPS)
def test_gspo_is_autograd_through_the_ratio_of_each_whole_response(
    clip: dict[str, Any], aggregation: str
):
    """The ratio as its paper defines it, the nth root of the responses' probabilities over each
    other, differentiated as it stands; ours only gives each token its share.
    """
    lengths, count = [1, 7, 30, 2, 60, 5] * 10, 60
    of = torch.arange(count).repeat_interleave(torch.tensor(lengths))
    old = -3 * torch.rand(len(of))
    drift = torch.linspace(-3, 3, count)[torch.randperm(count)][of]
    logprobs = (old + drift + torch.randn(len(of))).requires_grad_()
    worth = torch.randn(count)
    mask = torch.arange(60) < torch.tensor(lengths)[:, None]
    weights = token_weights(mask, aggregation, longest=64)[mask]
    means = torch.stack([(logprobs - old)[of == i].mean() for i in range(count)]).detach()
    loss, statistics = policy_loss(
        logprobs, old, worth[of], weights, kind="gspo", sequence_log_ratios=means[of], **clip
    )
    loss.backward()
    exact = logprobs.detach().clone().requires_grad_()
    total, cut, over = torch.zeros(()), 0, 0
    for i in range(count):
        ratio = (exact[of == i].sum() - old[of == i].sum()).div(lengths[i]).exp()
        gain = torch.minimum(
            ratio * worth[i], ratio.clamp(1 - clip["clip_low"], 1 + clip["clip_high"]) * worth[i]
        )
        bound = -math.inf if clip["dual_clip"] is None else clip["dual_clip"] * float(worth[i])
        capped = worth[i] < 0 and gain.item() < bound
        over += lengths[i] * capped
        cut += lengths[i] * bool(gain < ratio * worth[i] and not capped)
        gain = torch.tensor(bound) if capped else gain
        total = total - gain * weights[of == i].sum()
    total.backward()
    assert cut > 100
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, exact.grad, rtol=1e-4, atol=1e-8)
    assert (float(statistics.clipped), float(statistics.clipped_dual)) == (cut, over)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="clipped, gspo, cispo or unclipped"):
        policy_loss(*_tokens(3), kind="ppo", clip_low=0.2, clip_high=0.2)


@pytest.mark.parametrize("kind", ["clipped", "gspo", "cispo", "unclipped"])
def test_on_policy_every_loss_has_the_gradient_of_the_plain_policy_gradient(kind: str):
    logprobs, _, advantages, weights = _tokens()
    logprobs.requires_grad_()
    loss, statistics = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        weights,
        kind=kind,
        clip_low=0.2,
        clip_high=0.2,
        sequence_log_ratios=torch.zeros(400),
    )
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages * weights)
    assert float(statistics.clipped) == float(statistics.clipped_dual) == 0
    assert float(statistics.kl) == pytest.approx(0, abs=1e-6)


def test_ratios_beyond_the_exponent_limit_stay_finite_and_pull_nothing():
    logprobs = torch.tensor([0.0, -90.0], requires_grad=True)
    old = torch.tensor([-90.0, 0.0])
    loss, _ = policy_loss(
        logprobs, old, torch.tensor([-1.0, 1.0]), torch.ones(2), clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert logprobs.grad is not None
    assert loss.item() == pytest.approx(math.exp(20) - math.exp(-20), rel=1e-5)
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_no_tokens_cost_nothing():
    nothing = torch.zeros(0, requires_grad=True)
    loss, statistics = policy_loss(
        nothing, nothing, nothing, nothing, clip_low=0.2, clip_high=0.2, dual_clip=10.0
    )
    loss.backward()
    assert loss.item() == 0
    assert not statistics.stacked().any()
