"""What is each response token worth? From grades to the advantages that updates weigh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_advantages
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


def advantages(
    grades: Sequence[Sequence[Grade]], batch: TokenBatch, algorithm: AlgorithmConfig
) -> Tensor:
    """What each response token is worth, `[responses, tokens]`: the response's reward, where the KL
    to the reference counts there less that, beside those of others.
    """
    kl = None
    if algorithm.kl_coefficient and algorithm.kl_in == "reward":
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        old, ref = batch.old_logprobs.double(), batch.ref_logprobs.double()
        kl = kl_estimates(old, ref, estimator=algorithm.kl_estimator)
    return token_advantages(
        torch.tensor([[grade.reward for grade in group] for group in grades]),
        batch.learning_mask,
        estimator=algorithm.advantage,
        normalize_by_std=algorithm.normalize_by_std,
        kl=kl,
        kl_coefficient=algorithm.kl_coefficient,
    )
