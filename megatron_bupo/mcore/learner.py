"""A model that learns: its chunks under Megatron's DDP, with Megatron's optimizer.

An update is two halves. `_gradients` pushes a minibatch through the pipeline, and whoever builds on
this makes a loss of what arrives; `_step` changes what the policy trains, or nothing where loss or
gradient are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore.ddp import PhasedDDP, overlap
from megatron_bupo.mcore.hf_weights import Unit, units
from megatron_bupo.mcore.microbatches import input_lengths
from megatron_bupo.mcore.moe import balancing_routers, mean_imbalance
from megatron_bupo.mcore.native import build_native
from megatron_bupo.mcore.optimizer import PhasedOptimizer
from megatron_bupo.mcore.pipeline import PipelinedModel
from megatron_bupo.mcore.weight_stream import ActorWeights, trained_units
from megatron_bupo.types import TokenBatch


def _finalize(chunks: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Sum gradients over ranks; no division by token counts, for the loss already holds the
    global one.
    """
    finalize_model_grads(chunks, None, **kwargs)


class LearningModel(PipelinedModel):
    """A model with gradients and `config.optimizer`."""

    def __init__(
        self, arch: DecoderSizes, config: Config, open_slice: Callable[[str], Any]
    ) -> None:
        super().__init__(arch, config, open_slice)
        self.routers = balancing_routers(self.gpt_chunks)
        self.native.finalize_model_grads_func = _finalize
        self.wrapped = [PhasedDDP(self.native, self._ddp_config(), m) for m in self.wrapped]
        overlap(self.native, self.wrapped)
        self._unit_of = self.weights.unit_of
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

    def _gradients(
        self, minibatch: TokenBatch, policy: Policy, learn: Callable[..., Any]
    ) -> list[Any]:
        """Forward and backward of `minibatch`, for what `policy` trains; what the last stage's
        `learn(microbatch, hidden)` reports of each micro-batch.
        """
        trained = self.trained(policy)
        parameters = {p for p, unit in self._unit_of.items() if unit in trained}
        for chunk in self.wrapped:
            chunk.train_only(parameters)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.begin(sum(input_lengths(minibatch)))
        return self._run(minibatch, policy, learn=learn)

    def _imbalance(self, policy: Policy) -> float:
        """How unevenly the last minibatch used the experts; see `moe.mean_imbalance`."""
        return mean_imbalance(self.routers, self.arch.experts, policy)

    def _step(self, policy: Policy, lr: float, *, loss: float) -> float:
        """Step the optimizer, unless `loss` or a gradient is not finite: then the norm of the
        gradient, which is returned, is not finite either.
        """
        return self.optimizer.step(self.trained(policy), lr, loss=loss)

    def gather_parameters(self) -> None:
        """Until the next update parameters may be read without a forward pass. Collective."""
        for chunk in self.wrapped:
            chunk.gather_parameters()

    def all_weights(self) -> ActorWeights:
        """The whole model."""
        return ActorWeights(self.weights, units(self.arch), self.gather_parameters)
