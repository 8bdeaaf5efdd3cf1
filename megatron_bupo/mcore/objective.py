"""What an update makes small: the loss of a minibatch, micro-batch by micro-batch.

Here the settings meet the formulas of `algorithm/`. Everything that normalises is taken from the
whole minibatch, so the sum over micro-batches and ranks does not depend on how they were cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.kl import kl_estimates
from megatron_bupo.algorithm.policy_loss import ClipStatistics, policy_loss
from megatron_bupo.algorithm.rollout_correction import truncated_importance_weights
from megatron_bupo.config.schema import Config
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.types import TokenBatch


class Objective:
    """The loss of `minibatch`; `corrected`: truncated importance sampling weighs its tokens."""

    def __init__(self, minibatch: TokenBatch, config: Config, *, corrected: bool) -> None:
        self.minibatch, self.algorithm, self.corrected = minibatch, config.algorithm, corrected
        self.weights = token_weights(
            minibatch.learning_mask,
            config.algorithm.aggregation,
            longest=config.rollout.max_response_tokens,
        )
        # A batch without old log-probs wants them told, and entropies beside them
        self.with_entropy = minibatch.old_logprobs is None or self._entropy_counts

    @property
    def _entropy_counts(self) -> bool:
        return self.algorithm.entropy_coefficient > 0

    def loss(self, at: Tensor, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the loss that the response tokens at the flat indices `at` have, and the sums
        over them that `report` wants. All `[response tokens]`; with context parallelism collective
        among the ranks that share the sequences.
        """
        algorithm, at = self.algorithm, at.cpu()

        def here(column: Tensor | None) -> Tensor:
            assert column is not None
            return column.flatten()[at].to(logprobs.device)

        minibatch, weights = self.minibatch, here(self.weights)
        old = minibatch.old_logprobs
        before = logprobs.detach() if old is None else here(old)
        counts, correction = weights, ()
        if self.corrected:
            rollout, cap = here(minibatch.rollout_logprobs), algorithm.tis_cap
            importance, cut = truncated_importance_weights(before, rollout, cap=cap)
            counts = counts * importance
            correction = importance.sum(), cut.float().sum()
        of_sequences = algorithm.loss == "gspo"
        loss, statistics = policy_loss(
            logprobs,
            before,
            here(minibatch.advantages),
            counts,
            kind=algorithm.loss,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            sequence_log_ratios=(
                self._means_of_sequences(at, logprobs.detach() - before) if of_sequences else None
            ),
        )
        kl = torch.zeros_like(logprobs)
        if minibatch.ref_logprobs is not None:
            ref = here(minibatch.ref_logprobs)
            kl = kl_estimates(logprobs, ref, estimator=algorithm.kl_estimator)
            if algorithm.kl_in == "loss":
                loss = loss + algorithm.kl_coefficient * (kl * weights).sum()
        if self._entropy_counts:
            loss = loss - algorithm.entropy_coefficient * (entropies * weights).sum()
        entropy = entropies.detach().sum()
        return loss, torch.stack(
            (loss.detach(), kl.detach().sum(), entropy, *statistics.stacked(), *correction)
        )

    def _means_of_sequences(self, at: Tensor, values: Tensor) -> Tensor:
        """For each token the mean of `values` over its whole response, wherever its others are.

        Added up in order, not by atomics: tensor-parallel ranks must come to the same bits.
        """
        mask = self.minibatch.response_mask
        spread = torch.zeros(mask.numel(), device=values.device)
        spread[at.to(values.device)] = values
        sums = parallel.sum_over_context(spread.view(mask.shape).sum(1))
        means = sums / mask.sum(1).clamp(min=1).to(values.device)
        return means[(at // mask.shape[1]).to(values.device)]

    def report(self, sums: Sequence[Tensor]) -> dict[str, float]:
        """What the update is worth knowing by, of all micro-batches and ranks. Collective."""
        size = 3 + len(ClipStatistics.FIELDS) + (2 if self.corrected else 0)
        total = torch.stack(list(sums)).sum(0) if sums else torch.zeros(size, device=cpu.device())
        total = parallel.from_last_stage(parallel.sum_over_tokens(total)).double()
        loss, kl_to_reference, entropy, tokens, ratio, cut, dual, kl_to_old, *tis = total.tolist()
        tokens = max(tokens, 1.0)
        report = {
            "update/loss": loss,
            "update/ratio_mean": ratio / tokens,
            "update/ratio_clipped_fraction": cut / tokens,
            "update/ratio_dual_clipped_fraction": dual / tokens,
            "update/kl_to_old_nats": kl_to_old / tokens,
        }
        if self.algorithm.kl_coefficient:
            report["update/kl_to_reference_nats"] = kl_to_reference / tokens
        if self._entropy_counts:
            report["update/entropy_nats"] = entropy / tokens
        if self.corrected:
            weight, truncated = tis
            report["update/tis_weight_mean"] = weight / tokens
            report["update/tis_truncated_fraction"] = truncated / tokens
        return report
