from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.schema import Config, ModelConfig, RolloutConfig
from megatron_bupo.record.measures import mismatch_measures, policy_measures
from megatron_bupo.record.mismatch import Mismatch
from megatron_bupo.types import TokenBatch

KEYS = [f"rollout/logprob_gap_{name}_nats" for name in ("mean", "max", "k3")]


def scored(trainer: list[float], sampler: list[float]) -> tuple[torch.Tensor, TokenBatch]:
    """One response of those log-probs behind a prompt of one token, and an empty one."""
    both = torch.tensor([[0.0, *trainer], [0.0] * (1 + len(trainer))])
    mask = torch.zeros(both.shape, dtype=torch.bool)
    mask[0, 1:] = True
    rollout = torch.tensor([[0.0, *sampler], [0.0] * (1 + len(sampler))])
    return both, TokenBatch(torch.zeros(both.shape, dtype=torch.long), mask, rollout)


def test_the_gap_is_mean_maximum_and_the_k3_estimate_over_response_tokens():
    trainer, sampler = [-1.0, -0.25, -2.0], [-1.0, -0.5, -1.0]
    ratios = [math.exp(p - q) for p, q in zip(trainer, sampler, strict=True)]
    k3 = sum(r - 1 - math.log(r) for r in ratios) / 3
    assert mismatch_measures(*scored(trainer, sampler)) == pytest.approx(
        dict(zip(KEYS, [1.25 / 3, 1.0, k3], strict=True)), abs=1e-12
    )


def test_k3_is_on_average_the_kl_from_sampler_to_trainer():
    """Over all tokens of a vocabulary, each as often as the sampler draws it."""
    often = [1, 2, 3, 4]  # of 10
    sampler = [math.log(n / 10) for n in often]
    trainer = torch.tensor([0.3, -1.0, 0.5, 0.2]).log_softmax(-1).tolist()
    drawn = [v for v, n in enumerate(often) for _ in range(n)]
    gaps = mismatch_measures(*scored([trainer[v] for v in drawn], [sampler[v] for v in drawn]))
    kl = sum(n / 10 * (q - p) for n, q, p in zip(often, sampler, trainer, strict=True))
    assert gaps[KEYS[2]] == pytest.approx(kl, abs=1e-6)


def test_a_step_tells_of_the_policy_that_learns_and_of_the_full_one_where_it_was_looked_at():
    trainer, batch = scored([-1.0, -0.25], [-1.0, -0.5])
    scores, full = (trainer - 1, 3 * torch.ones(trainer.shape)), (trainer, -trainer)
    internal = policy_measures(InternalLayerPolicy(2), scores, batch)
    assert internal == {"entropy/internal_nats": 3.0}
    both = policy_measures(InternalLayerPolicy(2), scores, batch, full=full)
    assert both == internal | policy_measures(FULL, full, batch)
    assert policy_measures(FULL, full, batch) == {
        "entropy/full_nats": 0.625,
        **mismatch_measures(trainer, batch),
    }


def test_without_a_response_token_nothing_is_measured():
    logprobs, batch = scored([], [])
    for policy in (FULL, InternalLayerPolicy(2)):
        assert policy_measures(policy, (logprobs, logprobs), batch) == {}


def gap(mean: float, k3: float) -> dict[str, float]:
    return dict(zip(KEYS, [mean, 2 * mean, k3], strict=True))


def config(**rollout: Any) -> Config:
    return Config(rollout=RolloutConfig(**rollout))


def test_a_disagreement_is_told_once_and_again_when_it_is_twice_as_bad():
    mismatch = Mismatch(config())
    assert mismatch.after(0, {}) == mismatch.after(0, gap(1e-5, 1e-9)) == []
    [told] = mismatch.after(1, gap(0.02, 4e-4))
    assert told.startswith("step 2: trainer and sampler are 0.02 nats a token apart about the full")
    assert mismatch.after(2, gap(0.03, 4e-4)) == []
    assert len(mismatch.after(3, gap(0.05, 4e-4))) == 1
    assert len(mismatch.after(4, gap(0.05, 0.06))) == 1


@pytest.mark.parametrize(
    "inexact",
    [config(max_staleness=1), Config(model=ModelConfig(dtype="bfloat16"))],
    ids=["older weights", "bfloat16"],
)
def test_what_rounding_or_age_explains_is_not_told(inexact: Config):
    mismatch = Mismatch(inexact)
    assert mismatch.after(0, gap(0.02, 4e-4)) == []
    assert len(mismatch.after(1, gap(0.4, 0.06))) == 1
