from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from megatron_bupo.algorithm.advantages import (
    group_relative_advantages,
    leave_one_out_advantages,
    token_advantages,
    token_weights,
    whitened,
)

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
CLOSE = torch.tensor([[0.5, 0.5 + 2**-12], [100.0, 100.0 + 2**-10]])
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def loops(
    rewards: list[list[float]], mask: list[list[bool]], kl: list[list[float]], estimator: str
) -> list[list[float]]:
    """The definitions, a response and a token at a time; `kl` already times its coefficient."""
    worth: list[list[float]] = []
    for p, group in enumerate(rewards):
        own = [
            r - (0.0 if estimator == "reinforce_plus_plus" else sum(kl[p * len(group) + i]))
            for i, r in enumerate(group)
        ]
        for i, reward in enumerate(own):
            others = own[:i] + own[i + 1 :]
            value = reward
            if estimator == "rloo":
                value = reward - statistics.mean(others)
            elif estimator != "reinforce_plus_plus":
                value = reward - statistics.mean(own)
            if estimator == "grpo":
                value /= statistics.stdev(own) + 1e-6
            row = len(worth)
            worth.append([value] * len(mask[row]))
            if estimator == "reinforce_plus_plus":
                worth[row] = [value - sum(kl[row][t:]) for t in range(len(mask[row]))]
    if estimator.startswith("reinforce"):
        tokens = [worth[i][t] for i in range(len(mask)) for t in range(len(mask[0])) if mask[i][t]]
        mean, variance = statistics.mean(tokens), statistics.variance(tokens)
        worth = [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in worth]
    return [
        [value if learns else 0.0 for value, learns in zip(*rows, strict=True)]
        for rows in zip(worth, mask, strict=True)
    ]


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_equal_a_loop_over_responses_and_tokens(estimator: str, with_kl: bool):
    """Responses of unequal length, one of them empty, another that does not learn."""
    rewards = torch.randn(4, 3)
    place, ends = torch.arange(9), torch.randint(3, 10, (12, 1))
    response = (place >= 2) & (place < ends)
    response[5] = False
    learns = response.clone()
    learns[7] = False
    kl = torch.randn(12, 9) * response * with_kl
    advantages = token_advantages(
        rewards, learns, estimator=estimator, kl=kl if with_kl else None, kl_coefficient=0.3
    )
    expected = loops(rewards.tolist(), learns.tolist(), (0.3 * kl).tolist(), estimator)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=2e-6, rtol=1e-5)
    assert advantages.abs().max() > 0.5


def test_reinforce_plus_plus_compares_responses_without_a_group():
    mask = torch.ones(3, 2, dtype=torch.bool)
    alone = token_advantages(
        torch.tensor([[1.0], [0.0], [0.5]]), mask, estimator="reinforce_plus_plus"
    )
    deviation = 1 / math.sqrt(0.2 + 1e-8) / 2  # six tokens, two of each reward
    expected = torch.tensor([[deviation], [-deviation], [0.0]]).expand(3, 2)
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("rewards", [REWARDS, CLOSE, (5, 8), (1, 2)])
def test_group_advantages_are_rewards_beside_those_of_their_group(
    rewards: torch.Tensor | tuple[int, int],
):
    if isinstance(rewards, tuple):
        rewards = torch.randn(rewards)
    advantages = group_relative_advantages(rewards)
    centred = group_relative_advantages(rewards, normalize_by_std=False)
    alone = leave_one_out_advantages(rewards)
    for i, group in enumerate(rewards.tolist()):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert advantages[i].tolist() == pytest.approx(
            [(r - mean) / (std + 1e-6) for r in group], abs=1e-6
        )
        assert centred[i].tolist() == pytest.approx([r - mean for r in group], abs=1e-6)
        others = [statistics.mean(group[:j] + group[j + 1 :]) for j in range(len(group))]
        assert alone[i].tolist() == pytest.approx(
            [r - other for r, other in zip(group, others, strict=True)], abs=1e-6
        )


def test_without_its_std_grpo_is_dr_grpo():
    rewards, learns = torch.randn(3, 4), torch.ones(12, 2, dtype=torch.bool)
    plain: dict[str, Any] = {"estimator": "grpo", "normalize_by_std": False}
    assert torch.equal(
        token_advantages(rewards, learns, **plain),
        token_advantages(rewards, learns, estimator="dr_grpo"),
    )


def test_a_group_of_equal_rewards_teaches_nothing():
    equal = torch.tensor([[1.0, 1.0, 1.0], [0.3, 0.3, 0.3]])
    assert group_relative_advantages(equal).abs().max() < 0.1
    assert not group_relative_advantages(equal[:1]).any()
    learns = torch.ones(3, 2, dtype=torch.bool)
    for estimator in ESTIMATORS:
        assert not token_advantages(equal[:1], learns, estimator=estimator).any()


def test_nothing_or_a_single_token_is_whitened_to_zero():
    one = torch.tensor([[False, True]])
    assert whitened(torch.tensor([[3.0, 5.0]]), one).tolist() == [[0.0, 0.0]]
    assert whitened(torch.tensor([[3.0, 5.0]]), one & False).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 2, 2)])
def test_a_response_alone_has_nothing_to_be_compared_with(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="responses_per_prompt >= 2"):
        group_relative_advantages(torch.zeros(shape))


def test_token_mean_weighs_every_response_token_of_the_minibatch_alike():
    weights = token_weights(MASK, "token_mean")
    assert weights.tolist() == [[0, 0, 0.25, 0.25, 0.25, 0], [0, 0.25, 0, 0, 0, 0], [0] * 6]


def test_sequence_mean_weighs_every_response_alike():
    weights = token_weights(MASK, "sequence_mean")
    third = 1 / 3  # the empty response counts as one
    expected = [[0, 0, third / 3, third / 3, third / 3, 0], [0, third, 0, 0, 0, 0], [0] * 6]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_constant_length_weighs_every_token_alike_whatever_the_others_are():
    weights = token_weights(MASK, "constant_length", longest=8)
    torch.testing.assert_close(weights, MASK / 24)


def test_no_response_tokens_at_all_weigh_nothing():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for aggregation in ("token_mean", "sequence_mean", "constant_length"):
        assert not token_weights(nothing, aggregation, longest=5).any()
    for unknown in ("mean", "constant_length"):
        with pytest.raises(ValueError, match="token_mean, sequence_mean or"):
            token_weights(MASK, unknown)
    with pytest.raises(ValueError, match="unknown estimator 'gae'"):
        token_advantages(REWARDS, torch.ones(12, 2, dtype=torch.bool), estimator="gae")
