"""What is each response token worth? From grades to the advantages that updates weigh, and to the
returns that PPO's critic learns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_bupo.algorithm.advantages import critic_advantages, token_advantages
from megatron_bupo.algorithm.kl import kl_estimates
from megatron_bupo.config.schema import AlgorithmConfig
from megatron_bupo.types import Grade, RolloutGroup, TokenBatch


def learners(
    batch: TokenBatch, groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig
) -> TokenBatch:
    """The batch, with what is not to learn marked: with `mask_truncated`, responses that were cut.
    Their rewards say nothing of what they would have come to (overlong filtering: DAPO, arXiv
    2503.14476, section 3.4); the others are compared with them all the same.
    """
    if not algorithm.mask_truncated:
        return batch
    ended = [r.finish_reason == "stop" for group in groups for r in group.rollouts]
    return batch.with_learners(torch.tensor(ended))


def credited(
    batch: TokenBatch, grades: Sequence[Sequence[Grade]], algorithm: AlgorithmConfig
) -> TokenBatch:
    """The batch with what each response token is worth: the response's reward, where the KL to the
    reference counts there less that, beside those of others, or, with gae, beside what the batch's
    `values` foresaw; then with the returns too.
    """
    rewards = torch.tensor([[grade.reward for grade in group] for group in grades])
    kl = None
    # No reference log-probs: while the critic learns alone the policy is its own reference
    if batch.ref_logprobs is not None and algorithm.kl_in == "reward":
        assert batch.old_logprobs is not None
        old, ref = batch.old_logprobs.double(), batch.ref_logprobs.double()
        kl = kl_estimates(old, ref, estimator=algorithm.kl_estimator)
    if batch.values is None:
        advantages = token_advantages(
            rewards,
            batch.learning_mask,
            estimator=algorithm.advantage,
            normalize_by_std=algorithm.normalize_by_std,
            kl=kl,
            kl_coefficient=algorithm.kl_coefficient,
        )
        return batch.with_advantages(advantages)
    advantages, returns = critic_advantages(
        rewards,
        batch.values,
        batch.learning_mask,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        whiten=algorithm.normalize_by_std,
        kl=kl,
        kl_coefficient=algorithm.kl_coefficient,
    )
    return batch.with_advantages(advantages).with_returns(returns)
