"""The actor that learns: minibatches in, optimizer updates out.

It does not know the algorithm's schedule: every call says which policy it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.algorithm.kl import kl_estimates
from megatron_bupo.algorithm.policy_loss import ClipStatistics, clipped_policy_loss
from megatron_bupo.algorithm.rollout_correction import truncated_importance_weights
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.actor import MegatronActor, put_together
from megatron_bupo.mcore.ddp import PhasedDDP, overlap
from megatron_bupo.mcore.hf_weights import Unit, units
from megatron_bupo.mcore.microbatches import Microbatch, input_lengths
from megatron_bupo.mcore.moe import balancing_routers, mean_imbalance
from megatron_bupo.mcore.native import build_native
from megatron_bupo.mcore.optimizer import PhasedOptimizer
from megatron_bupo.mcore.reference import ReferenceWeights
from megatron_bupo.mcore.weight_stream import ActorWeights, trained_units
from megatron_bupo.types import TokenBatch, UpdateReport


def _finalize(chunks: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Sum gradients over ranks; no division by token counts, for the loss already holds the
    global one.
    """
    finalize_model_grads(chunks, None, **kwargs)


class MegatronTrainer(MegatronActor):
    """An actor under Megatron's DDP with Megatron's optimizer."""

    def __init__(
        self, arch: DecoderSizes, config: Config, open_slice: Callable[[str], Any]
    ) -> None:
        super().__init__(arch, config, open_slice)
        self.routers = balancing_routers(self.gpt_chunks)
        self.native.finalize_model_grads_func = _finalize
        self.wrapped = [PhasedDDP(self.native, self._ddp_config(), m) for m in self.wrapped]
        overlap(self.native, self.wrapped)
        self._unit_of = self.weights.unit_of
        # Before a checkpoint is loaded: on resume too, the reference is the model at model.path.
        self.reference = (
            ReferenceWeights(self._unit_of) if config.algorithm.kl_coefficient else None
        )
        self.optimizer = PhasedOptimizer(
            self.wrapped, self._unit_of, units(arch), config, self.native.params_dtype
        )
        self.router.frozen_layers = self._frozen_layers()
        self.native.grad_scale_func = self.optimizer.megatron.scale_loss

    def _ddp_config(self) -> Any:
        ours = {
            "grad_reduce_in_fp32": True,
            "use_distributed_optimizer": self.config.parallel.distributed_optimizer,
        }
        return build_native(DistributedDataParallelConfig, ours, self.config.megatron)

    def trained(self, policy: Policy) -> dict[Unit, float]:
        """The units that an update of `policy` changes, with their learning-rate factors."""
        return trained_units(policy, self.arch, self.config.optimizer.lr_factors)

    def _frozen_layers(self) -> int:
        """How many layers, from the bottom up, lie below all that learns."""
        learns = [unit in self.trained(FULL) for unit in units(self.arch)]
        return max(learns.index(True) - 1, 0)  # the embedding comes first

    def begin_phase(self) -> None:
        """The next step is the first to train another policy: see `bupo.optimizer_at_switch`."""
        self.optimizer.begin_phase()

    def ref_logprobs(self, batch: TokenBatch, policy: Policy, *, temperature: float) -> Tensor:
        """Log-probs of every response token under `policy` with the weights that training began
        with, fp32 nats `[responses, tokens]`.
        """
        assert self.reference is not None, "held only where algorithm.kl_coefficient asks for it"
        self.gather_parameters()
        read = trained_units(policy, self.arch)  # those whose learning rate is 0 too
        with self.reference.in_place_of([p for p, unit in self._unit_of.items() if unit in read]):
            return self.logprobs(batch, policy, temperature=temperature, with_entropy=False)[0]

    def update(self, minibatch: TokenBatch, policy: Policy, *, lr: float) -> UpdateReport:
        """One optimizer update on `minibatch`, of the units that `policy` trains. Skipped where
        its loss or gradient is not finite.

        Its old log-probs come from the same policy; without any, they are those of now.
        """
        trained = self.trained(policy)
        parameters = {p for p, unit in self._unit_of.items() if unit in trained}
        for chunk in self.wrapped:
            chunk.train_only(parameters)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.begin(sum(input_lengths(minibatch)))
        weights = token_weights(minibatch.response_mask, self.config.algorithm.loss_aggregation)
        corrected = policy == FULL and self.config.corrects_rollouts
        learn = partial(self._loss, minibatch, weights, corrected=corrected)
        outcomes = self._run(minibatch, policy, learn=learn)
        report = self._report([sums for sums, _ in outcomes], corrected=corrected)
        if self.balances:
            imbalance = mean_imbalance(self.routers, self.arch.experts, policy)
            report["update/expert_imbalance"] = imbalance
        scores = None
        if minibatch.old_logprobs is None:
            scores = put_together(minibatch, [scored for _, scored in outcomes])
        grad_norm = self.optimizer.step(trained, lr, loss=report["update/loss"])
        skipped = not math.isfinite(grad_norm)
        return UpdateReport(
            {**report, "update/grad_norm": grad_norm, "update/skipped": float(skipped)}, scores
        )

    def _loss(
        self,
        minibatch: TokenBatch,
        weights: Tensor,
        microbatch: Microbatch,
        hidden: Tensor,
        *,
        corrected: bool,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Loss, token count and what to report (sums, and the tokens' log-probs and entropies), as
        Megatron's schedule wants them.
        """
        algorithm, temperature = self.config.algorithm, self.config.rollout.temperature
        old, at = minibatch.old_logprobs, microbatch.at.cpu()
        logprobs, entropies = self._read_out(
            microbatch, hidden, temperature, with_entropy=old is None
        )

        def here(column: Tensor | None) -> Tensor:
            assert column is not None
            return column.flatten()[at].to(logprobs.device)

        before = logprobs.detach() if old is None else here(old)
        counts, correction = here(weights), ()
        if corrected:
            rollout, cap = here(minibatch.rollout_logprobs), algorithm.tis_cap
            importance, cut = truncated_importance_weights(before, rollout, cap=cap)
            counts = counts * importance
            correction = importance.sum(), cut.float().sum()
        loss, statistics = clipped_policy_loss(
            logprobs,
            before,
            here(minibatch.advantages),
            counts,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        kl = torch.zeros_like(logprobs)
        if minibatch.ref_logprobs is not None:
            ref = here(minibatch.ref_logprobs)
            kl = kl_estimates(logprobs, ref, estimator=algorithm.kl_estimator)
            if algorithm.kl_in == "loss":
                loss = loss + algorithm.kl_coefficient * (kl * here(weights)).sum()
        tokens = torch.tensor(len(at), dtype=torch.int, device=loss.device)
        sums = (loss.detach(), kl.detach().sum(), *statistics.stacked(), *correction)
        scored = torch.stack((logprobs, entropies)).detach()
        return loss, tokens, (torch.stack(sums), (microbatch.at, scored))

    def _report(self, sums: list[Tensor], *, corrected: bool) -> dict[str, float]:
        size = 2 + len(ClipStatistics.FIELDS) + (2 if corrected else 0)
        nothing = torch.zeros(size, device=cpu.device())
        total = torch.stack(sums).sum(0) if sums else nothing
        total = parallel.from_last_stage(parallel.sum_over_tokens(total)).double()
        loss, kl_to_reference, tokens, ratio, clipped, dual, kl_to_old, *tis = total.tolist()
        tokens = max(tokens, 1.0)
        report = {
            "update/loss": loss,
            "update/ratio_mean": ratio / tokens,
            "update/ratio_clipped_fraction": clipped / tokens,
            "update/ratio_dual_clipped_fraction": dual / tokens,
            "update/kl_to_old_nats": kl_to_old / tokens,
        }
        if self.reference is not None:
            report["update/kl_to_reference_nats"] = kl_to_reference / tokens
        if corrected:
            weight, truncated = tis
            report["update/tis_weight_mean"] = weight / tokens
            report["update/tis_truncated_fraction"] = truncated / tokens
        return report

    def gather_parameters(self) -> None:
        """Until the next update parameters may be read without a forward pass. Collective."""
        for chunk in self.wrapped:
            chunk.gather_parameters()

    def changed_weights(self, policy: Policy) -> ActorWeights:
        """All that an update of `policy` changed."""
        return ActorWeights(self.weights, self.trained(policy), self.gather_parameters)

    def all_weights(self) -> ActorWeights:
        """The whole model."""
        return ActorWeights(self.weights, units(self.arch), self.gather_parameters)
