"""The actor that learns: minibatches in, optimizer updates out.

It does not know the algorithm's schedule: every call says which policy it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.learner import LearningModel
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.objective import Objective
from megatron_bupo.mcore.pipeline import put_together
from megatron_bupo.mcore.reference import ReferenceWeights
from megatron_bupo.mcore.weight_stream import ActorWeights, trained_units
from megatron_bupo.types import TokenBatch, UpdateReport


class MegatronTrainer(LearningModel, MegatronActor):
    """An actor that learns what `config.algorithm` asks for."""

    def __init__(
        self, arch: DecoderSizes, config: Config, open_slice: Callable[[str], Any]
    ) -> None:
        super().__init__(arch, config, open_slice)
        # Before a checkpoint is loaded: on resume too, the reference is the model at model.path.
        self.reference = (
            ReferenceWeights(self._unit_of) if config.algorithm.kl_coefficient else None
        )

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
        corrected = policy == FULL and self.config.corrects_rollouts
        objective = Objective(minibatch, self.config, corrected=corrected)
        outcomes = self._gradients(minibatch, policy, partial(self._loss, objective))
        report = objective.report([sums for sums, _ in outcomes])
        if self.balances:
            report["update/expert_imbalance"] = self._imbalance(policy)
        scores = None
        if minibatch.old_logprobs is None:
            logprobs, entropies = put_together(
                minibatch, [scored for _, scored in outcomes], columns=2
            )
            scores = logprobs, entropies
        grad_norm = self._step(policy, lr, loss=report["update/loss"])
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

    def changed_weights(self, policy: Policy) -> ActorWeights:
        """All that an update of `policy` changed."""
        return ActorWeights(self.weights, self.trained(policy), self.gather_parameters)
