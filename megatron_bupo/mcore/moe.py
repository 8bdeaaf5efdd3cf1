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

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bupo.hf.experts import Experts

if not hasattr(
    moe_utils, "te_general_gemm"
):  # asked for, but imported with Transformer Engine only
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
    # A ModuleSpec up to Megatron-Core 0.17, then a partial.
    parts: Any = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    parts.router = BalancingRouter
    return layer


class BalancingRouter(TopKRouter):
    """Megatron's router, whose load-balancing loss knows how many tokens the minibatch has.

    Megatron multiplies it by the micro-batch's tokens (0.16 by this rank's, 0.19 by all ranks') and
    divides by the minibatch's after the last backward pass; here nothing is divided afterwards.
    """

    minibatch_tokens = 0  # over all ranks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calculate_per_token_loss = False

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        *args: Any,
        valid_token_count: int | Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Add this rank's part of a micro-batch's loss to the gradient of `activation`."""
        tokens = torch.as_tensor(valid_token_count, dtype=torch.float32, device=aux_loss.device)
        if reduce_group.size() > 1:
            tokens = tokens.clone()
            dist.all_reduce(tokens, group=reduce_group)
        share = tokens / self.minibatch_tokens
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss * share,
            aux_loss_name,
            reduce_group,
            *args,
            **kwargs,
        )


def balancing_routers(chunks: Sequence[Any]) -> Iterator[BalancingRouter]:
    """The routers of this rank's `chunks` that have a load-balancing loss."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancingRouter) and module.is_aux_loss_enabled():
                yield module
