"""The actor that learns: minibatches in, optimizer updates out.

It does not know the algorithm's schedule: every call says which policy it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.algorithm.policy_loss import ClipStatistics, clipped_policy_loss
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.ddp import PhasedDDP, overlap
from megatron_bupo.mcore.hf_weights import Unit, units
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.native import build_native
from megatron_bupo.mcore.optimizer import PhasedOptimizer
from megatron_bupo.mcore.weight_stream import trained_units
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
        self.native.finalize_model_grads_func = _finalize
        self.wrapped = [PhasedDDP(self.native, self._ddp_config(), m) for m in self.wrapped]
        overlap(self.native, self.wrapped)
        self._unit_of = self.weights.unit_of
        self.optimizer = PhasedOptimizer(
            self.wrapped, self._unit_of, units(arch), config, self.native.params_dtype
        )
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

    def begin_phase(self) -> None:
        """The next step is the first to train another policy: see `bupo.optimizer_at_switch`."""
        self.optimizer.begin_phase()

    def update(self, minibatch: TokenBatch, policy: Policy, *, lr: float) -> UpdateReport:
        """One optimizer update on `minibatch` (with its old log-probs), of the units that
        `policy` trains. Skipped where its loss or gradient is not finite.
        """
        assert minibatch.old_logprobs is not None, (
            "old log-probs come from the same policy, before the update"
        )
        trained = self.trained(policy)
        parameters = {p for p, unit in self._unit_of.items() if unit in trained}
        for chunk in self.wrapped:
            chunk.train_only(parameters)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        weights = token_weights(minibatch.response_mask, self.config.algorithm.loss_aggregation)
        columns = (minibatch.old_logprobs, minibatch.advantages, weights)
        loss = partial(self._loss, [c.flatten() for c in columns])
        sums = self._run(minibatch, policy, learn=loss)
        report = self._report(sums)
        grad_norm = self.optimizer.step(trained, lr, loss=report["update/loss"])
        skipped = not math.isfinite(grad_norm)
        return UpdateReport(
            {**report, "update/grad_norm": grad_norm, "update/skipped": float(skipped)}
        )

    def _loss(
        self, columns: list[Tensor], microbatch: Microbatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, token count and sums to report, as Megatron's schedule wants them."""
        algorithm = self.config.algorithm
        temperature = self.config.rollout.temperature
        logprobs, _ = self._read_out(microbatch, hidden, temperature, with_entropy=False)
        at = microbatch.at.cpu()
        old, advantages, weights = (c[at].to(logprobs.device) for c in columns)
        loss, statistics = clipped_policy_loss(
            logprobs,
            old,
            advantages,
            weights,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        tokens = torch.tensor(len(at), dtype=torch.int, device=loss.device)
        return loss, tokens, torch.cat((loss.detach().reshape(1), statistics.stacked()))

    def _report(self, sums: list[Tensor]) -> dict[str, float]:
        total = torch.stack(sums).sum(0) if sums else torch.zeros(1 + len(ClipStatistics.FIELDS))
        total = parallel.from_last_stage(parallel.sum_over_tokens(total)).double()
        loss, tokens, ratio, clipped, dual, kl = total.tolist()
        tokens = max(tokens, 1.0)
        return {
            "update/loss": loss,
            "update/ratio_mean": ratio / tokens,
            "update/ratio_clipped_fraction": clipped / tokens,
            "update/ratio_dual_clipped_fraction": dual / tokens,
            "update/kl_to_old_nats": kl / tokens,
        }

    def gather_parameters(self) -> None:
        """Until the next update parameters may be read without a forward pass. Collective."""
        for chunk in self.wrapped:
            chunk.gather_parameters()

    def changed_weights(self, policy: Policy) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of all that an update of `policy` changed. Collective."""
        self.gather_parameters()
        return self.weights.tensors(self.trained(policy))

    def all_weights(self) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of the whole model. Collective."""
        self.gather_parameters()
        return self.weights.tensors(units(self.arch))
