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
from torch import Tensor

from megatron_bupo.mcore.attention import PackedAttention, PackedTEAttention


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


def _plain_layer(*, qk_norm: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
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
    if uses_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        parts: Any = layer.submodules
        parts.self_attention.submodules.core_attention = PackedTEAttention
        norm: Any = te.TENorm
    else:
        layer, norm = _plain_layer(qk_norm=qk_norm), RMSNorm
    layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
