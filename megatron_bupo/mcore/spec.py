"""Which modules a layer is made of: Transformer Engine's where it imports, plain torch's otherwise.

The plain modules close two gaps of Megatron-Core's local spec: its RMSNorm refuses sequence
parallelism, and its attention knows neither packed rows nor context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_bupo.mcore.attention import PackedAttention, PackedTEAttention
from megatron_bupo.mcore.moe import has_experts, with_balancing_router


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; `[..., hidden] -> [..., hidden]`."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron then sums this weight's gradient over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # Statistics in fp32 and the product in the input's dtype: what HF models compute.
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)


def uses_transformer_engine() -> bool:
    """Are layers made of Transformer Engine's modules here, or of plain torch's?"""
    return te.HAVE_TE and torch.cuda.is_available()


def _plain_layer(*, qk_norm: bool, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(experts, qk_layernorm=qk_norm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention: Any = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def block_spec(
    config: TransformerConfig, *, qk_norm: bool, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage (and virtual stage) builds, and the norm after the
    last one.
    """

    def layer(experts: int | None) -> ModuleSpec:
        if uses_transformer_engine():
            spec = get_gpt_layer_with_transformer_engine_spec(
                experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=qk_norm
            )
            parts: Any = spec.submodules
            parts.self_attention.submodules.core_attention = PackedTEAttention
        else:
            spec = _plain_layer(qk_norm=qk_norm, experts=experts)
        return with_balancing_router(spec) if experts else spec

    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    last = first + get_num_layers_to_build(config, vp_stage, pp_rank)
    specs = [layer(config.num_moe_experts if i else None) for i in has_experts(config)[first:last]]
    norm: Any = te.TENorm if uses_transformer_engine() else RMSNorm
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
