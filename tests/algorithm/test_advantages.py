from __future__ import annotations

import statistics

import pytest
import torch

from megatron_bupo.algorithm.advantages import (
    group_relative_advantages,
    signal_fraction,
    token_weights,
)

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


CLOSE = torch.tensor([[0.5, 0.5 + 2**-12], [100.0, 100.0 + 2**-10]])


@pytest.mark.parametrize("rewards", [REWARDS, CLOSE, (5, 8), (1, 2)])
def test_advantages_are_rewards_beside_those_of_their_group(
    rewards: torch.Tensor | tuple[int, int],
):
    if isinstance(rewards, tuple):
        rewards = torch.randn(rewards)
    advantages = group_relative_advantages(rewards)
    centred = group_relative_advantages(rewards, normalize_by_std=False)
    for i, group in enumerate(rewards.tolist()):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert advantages[i].tolist() == pytest.approx(
            [(r - mean) / (std + 1e-6) for r in group], abs=1e-6
        )
        assert centred[i].tolist() == pytest.approx([r - mean for r in group], abs=1e-6)


def test_a_group_of_equal_rewards_teaches_nothing():
    equal = torch.tensor([[1.0, 1.0, 1.0], [0.3, 0.3, 0.3]])
    assert group_relative_advantages(equal).abs().max() < 0.1
    assert not group_relative_advantages(equal[:1]).any()
    assert signal_fraction(REWARDS) == pytest.approx(2 / 3)
    assert signal_fraction(equal) == 0


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


def test_no_response_tokens_at_all_weigh_nothing():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for aggregation in ("token_mean", "sequence_mean"):
        assert not token_weights(nothing, aggregation).any()
    with pytest.raises(ValueError, match="token_mean or sequence_mean"):
        token_weights(MASK, "mean")
