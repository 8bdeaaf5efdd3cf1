from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_bupo.algorithm.advantages import critic_advantages, token_rewards
from megatron_bupo.algorithm.value import explained_variance, gae, value_loss

LENGTH = 11


def loops(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """The definition as a sum over what is ahead (arXiv 1506.02438, Eq 16), of one response."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * gae_lambda) ** ahead * delta for ahead, delta in enumerate(deltas[t:]))
        for t in range(len(rewards))
    ]


def masks() -> torch.Tensor:
    """Responses of unequal length and beginning: an empty one, a single token, one with a hole."""
    place, begin = torch.arange(LENGTH), torch.randint(1, 4, (8, 1))
    mask = (place >= begin) & (place < begin + torch.randint(2, 8, (8, 1)))
    mask[2] = False
    mask[5] = place == 4
    mask[6] = (place == 3) | (place == 6) | (place == 7)
    return mask


def at(row: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return row[mask].tolist()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_a_sum_over_what_is_ahead(gamma: float, gae_lambda: float):
    mask = masks()
    rewards, values = torch.randn(8, LENGTH), torch.randn(8, LENGTH)
    values[~mask] = math.nan  # what a critic says elsewhere is never read
    rewards[~mask] = math.inf
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for i in range(8):
        expected = loops(at(rewards[i], mask[i]), at(values[i], mask[i]), gamma, gae_lambda)
        assert at(advantages[i], mask[i]) == pytest.approx(expected, abs=1e-12)
        told = [a + v for a, v in zip(expected, at(values[i], mask[i]), strict=True)]
        assert at(returns[i], mask[i]) == pytest.approx(told, abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_a_response_earns_its_reward_at_its_last_token_and_pays_the_kl_of_each(
    with_kl: bool, whiten: bool
):
    mask, values, kl = masks(), torch.randn(8, LENGTH), torch.randn(8, LENGTH) * with_kl
    kl[~mask] = 7.0  # of prompts: read by nobody
    rewards = torch.randn(4, 2)
    advantages, returns = critic_advantages(
        rewards,
        values,
        mask,
        gamma=0.9,
        gae_lambda=0.8,
        whiten=whiten,
        kl=kl if with_kl else None,
        kl_coefficient=0.3,
    )
    plain: list[list[float]] = []
    for i, reward in enumerate(rewards.flatten().tolist()):
        earned = [-0.3 * k for k in at(kl[i], mask[i])]
        if earned:
            earned[-1] += reward
        plain.append(loops(earned, at(values[i], mask[i]), 0.9, 0.8))
        told = [a + v for a, v in zip(plain[i], at(values[i], mask[i]), strict=True)]
        assert at(returns[i], mask[i]) == pytest.approx(told, abs=1e-6)
    tokens = [value for row in plain for value in row]
    mean, std = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    for i, row in enumerate(plain):
        expected = [(value - mean) / std for value in row] if whiten else row
        assert at(advantages[i], mask[i]) == pytest.approx(expected, abs=1e-5)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages[~mask].any()


def test_without_discounts_an_advantage_is_the_reward_less_the_value():
    """With whole numbers next to large ones, which fp32 would not tell apart."""
    mask, values = masks(), torch.full((8, LENGTH), 2.0**20)
    rewards = 2.0**20 + torch.arange(8).view(4, 2) / 8
    advantages, returns = critic_advantages(
        rewards, values, mask, gamma=1.0, gae_lambda=1.0, whiten=False
    )
    above = (torch.arange(8) / 8)[:, None].expand(8, LENGTH)
    assert torch.equal(advantages, above * mask)
    assert torch.equal(returns, rewards.view(8, 1) * mask)


def test_a_critic_that_knows_the_future_leaves_no_advantage():
    mask, rewards = masks(), torch.rand(8, 1)
    left = mask.flip(1).cumsum(1).flip(1) - 1  # tokens after this one
    values = rewards.double() * 0.9 ** left.double()
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, _ = gae(
            token_rewards(rewards, mask), values, mask, gamma=0.9, gae_lambda=gae_lambda
        )
        assert advantages.abs().max() < 1e-12


@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_value_loss_equals_a_loop_over_tokens(clip_range: float | None):
    old, returns, weights = torch.randn(40), torch.randn(40), torch.rand(40)
    values = (old + torch.randn(40)).requires_grad_()
    loss, clipped = value_loss(values, old, returns, weights, clip_range=clip_range)
    loss.backward()
    total, count, slopes = 0.0, 0, []
    tokens = zip(*(x.tolist() for x in (values, old, returns, weights)), strict=True)
    for value, before, earned, weight in tokens:
        plain, slope = (value - earned) ** 2, weight * (value - earned)
        if clip_range is not None:
            near = min(max(value, before - clip_range), before + clip_range)
            if (near - earned) ** 2 > plain:
                plain, slope, count = (near - earned) ** 2, 0.0, count + 1
        total += weight * plain / 2
        slopes.append(slope)
    assert loss.item() == pytest.approx(total)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(slopes, abs=1e-6)
    assert int(clipped) == count
    assert (count > 3) == (clip_range is not None)


def test_explained_variance_tells_what_is_foreseen():
    mask = masks()
    returns, noise = torch.randn(8, LENGTH), torch.randn(8, LENGTH)
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros(8, LENGTH), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    earned, missed = at(returns, mask), at(returns - noise, mask)
    expected = 1 - statistics.variance(missed) / statistics.variance(earned)
    assert explained_variance(noise, returns, mask) == pytest.approx(expected, abs=1e-6)
    assert explained_variance(noise, torch.ones(8, LENGTH), mask) == 0
    assert explained_variance(noise, returns, mask & False) == 0
