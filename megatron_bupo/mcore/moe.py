"""Mixtures of experts in Megatron-Core: which of its settings compute what the checkpoint means.

The router's scores are softmax(W x) over all experts; where the checkpoint scales a token's chosen
scores to sum to 1, that equals a softmax over the chosen logits alone. No expert has a capacity and
no token is dropped: a response's log-prob must not depend on what else is in its micro-batch.

The load-balancing loss (off, as in RL it competes with the reward; `megatron.moe_aux_loss_coeff`)
is Megatron's, per layer and micro-batch (Switch Transformer, eq 4),

    experts * sum_i f_i P_i,  f_i: share of choices that fall on expert i,  P_i: its mean score,

and counts in a minibatch as the mean over its tokens, as the policy's loss does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.hf.experts import Experts
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.depth import is_above

# Megatron-Core 0.16 asks whether it is None, but knows it only with Transformer Engine.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def expert_settings(experts: Experts | None, layers: int, *, grouped: bool) -> dict[str, Any]:
    """What Megatron-Core's TransformerConfig must know of `experts` in a model of `layers`."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_layer_freq": [int(layer in experts.layers) for layer in range(1, layers + 1)],
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        # Which experts a token goes to hangs on small differences, so these are not rounded.
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
    }


def has_experts(config: TransformerConfig) -> list[bool]:
    """Of each layer of the whole model."""
    layers, pattern = config.num_layers, config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * layers
    assert isinstance(pattern, list), "as expert_settings has it"
    return [bool(layer) for layer in pattern]


def with_balancing_router(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer with experts, its router exchanged for `BalancingRouter`."""
    mlp: Any = layer.submodules.mlp  # type: ignore[union-attr]
    # A ModuleSpec in Megatron-Core 0.16, a partial in 0.19.
    parts: Any = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    parts.router = BalancingRouter
    return layer


class BalancingRouter(TopKRouter):
    """Megatron's router, whose load-balancing loss knows how many tokens the minibatch has.

    Megatron multiplies it by the micro-batch's tokens and divides by the minibatch's after the last
    backward pass; here nothing is divided afterwards. Also, where tensor- or context-parallel ranks
    share the tokens, 0.16 counts those of one rank alone, and with a padding mask both 0.16 and
    0.19 those of all ranks as one's own.
    """

    minibatch_tokens = 0  # over all ranks
    imbalance: Tensor | float = 0.0  # this rank's part of the minibatch's loss, at coefficient 1

    def begin(self, minibatch_tokens: int) -> None:
        """A new minibatch, of so many tokens."""
        self.minibatch_tokens, self.imbalance = minibatch_tokens, 0.0

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Add this rank's part of a micro-batch's loss to the gradient of `probs`. Scores and
        choices, `[tokens, experts]` each, are zero where there is padding.
        """
        choices = routing_map.sum(0, dtype=torch.float32)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(choices, group=self.tp_cp_group)
        of_each_token = len(choices) / choices.sum().clamp(min=1)  # nothing but padding: loss 0
        loss = (scores_for_aux_loss.sum(0) * choices).sum() * of_each_token / self.minibatch_tokens
        self.imbalance += loss.detach()
        coefficient = self.get_aux_loss_coeff("aux_loss")
        return cast("Tensor", MoEAuxLossAutoScaler.apply(probs, loss * coefficient))


def balancing_routers(chunks: Sequence[Any]) -> list[BalancingRouter]:
    """The routers of this rank's `chunks`."""
    return [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, BalancingRouter)
    ]


def has_balance_loss(config: TransformerConfig) -> bool:
    """Is the load-balancing loss on?"""
    return config.num_moe_experts is not None and config.moe_aux_loss_coeff != 0


def mean_imbalance(
    routers: Sequence[BalancingRouter], experts: Experts | None, policy: Policy
) -> float:
    """The minibatch's load-balancing loss at coefficient 1, as a mean over the layers with
    `experts` that `policy` reaches; 1 where all experts get as much. Collective.
    """
    layers = [n for n in (experts.layers if experts else ()) if not is_above(policy, n)]
    total = torch.stack([torch.zeros(()), *(torch.as_tensor(r.imbalance).cpu() for r in routers)])
    total = total.sum().to(cpu.device())
    dist.all_reduce(total)
    return float(total) / max(1, len(layers))


def padding_mask(chunk: Any, padding: Tensor) -> Tensor:
    """`padding` `[1, tokens]` as the GPTModel `chunk` hands it to its routers, which do not count
    these tokens: only with the embedding does Megatron cut it for sequence parallelism.
    """
    if chunk.pre_process or not chunk.config.sequence_parallel:
        return padding
    group = parallel.tensor_group()
    return padding.chunk(group.size(), dim=1)[group.rank()]
