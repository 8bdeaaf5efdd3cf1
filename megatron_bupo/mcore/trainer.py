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

from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore.actor import MegatronActor, put_together
from megatron_bupo.mcore.ddp import PhasedDDP, overlap
from megatron_bupo.mcore.hf_weights import Unit, units
from megatron_bupo.mcore.microbatches import Microbatch, input_lengths
from megatron_bupo.mcore.moe import balancing_routers, mean_imbalance
from megatron_bupo.mcore.native import build_native
from megatron_bupo.mcore.objective import Objective
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
        if minibatch.old_logprobs is not None:
            minibatch = minibatch.of_learners()  # else what does not learn is to be scored
        trained = self.trained(policy)
        parameters = {p for p, unit in self._unit_of.items() if unit in trained}
        for chunk in self.wrapped:
            chunk.train_only(parameters)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.begin(sum(input_lengths(minibatch)))
        corrected = policy == FULL and self.config.corrects_rollouts
        objective = Objective(minibatch, self.config, corrected=corrected)
        outcomes = self._run(minibatch, policy, learn=partial(self._loss, objective))
        report = objective.report([sums for sums, _ in outcomes])
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
        self, objective: Objective, microbatch: Microbatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Loss, token count and what to report (sums, and the tokens' log-probs and entropies), as
        Megatron's schedule wants them.
        """
        logprobs, entropies = self._read_out(
            microbatch,
            hidden,
            self.config.rollout.temperature,
            with_entropy=objective.with_entropy,
        )
        loss, sums = objective.loss(microbatch.at, logprobs, entropies)
        tokens = torch.tensor(len(microbatch.at), dtype=torch.int, device=loss.device)
        scored = torch.stack((logprobs, entropies)).detach()
        return loss, tokens, (sums, (microbatch.at, scored))

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
