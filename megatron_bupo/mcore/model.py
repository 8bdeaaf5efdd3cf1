"""An HF architecture as Megatron-Core model chunks under any layout, and what reads them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.logprobs import VocabShard
from megatron_bupo.mcore.moe import expert_settings
from megatron_bupo.mcore.native import build_native
from megatron_bupo.mcore.spec import block_spec, uses_transformer_engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(arch: Architecture, config: Config) -> TransformerConfig:
    """Megatron-Core's description of the model and its layout."""
    ours: dict[str, Any] = {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "qk_layernorm": arch.qk_norm,
        "add_qkv_bias": arch.qkv_bias,
        "add_bias_linear": arch.mlp_bias,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # Unfused, Megatron's MLP keeps half of the first linear layer's output a second time.
        "bias_activation_fusion": True,
        "perform_initialization": False,  # every weight comes from the checkpoint
        **expert_settings(arch.experts, arch.layers, grouped=uses_transformer_engine()),
    }
    return build_native(TransformerConfig, ours | run_settings(config), config.megatron)


def run_settings(config: Config) -> dict[str, Any]:
    """What the run decides of Megatron-Core's settings, whatever the model."""
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    fused = torch.cuda.is_available()
    interleaved = parallel.vpp > 1
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "use_cpu_initialization": not fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": parallel.tp,
        "context_parallel_size": parallel.cp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if interleaved else None,
        "sequence_parallel": parallel.sp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp or parallel.tp,
        # Batched sends between two stages confuse "previous" with "next", silently: at PP=2 they
        # are one peer.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # The loss arrives divided by the global token count: gradients are summed, never averaged.
        "calculate_per_token_loss": True,
    }


def padded_vocab_size(arch: DecoderSizes, tp: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-arch.vocab_size // tp) * tp


def vocab_shard(arch: DecoderSizes) -> VocabShard:
    """This rank's part of the vocabulary."""
    tp, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    rows = padded_vocab_size(arch, tp) // tp
    first = rank * rows
    valid = max(0, min(rows, arch.vocab_size - first))
    return VocabShard(first, valid, parallel.tensor_group() if tp > 1 else None)


def inverse_frequencies(arch: Architecture) -> Tensor:
    """RoPE's inverse frequencies `[head_dim / 2]` in fp32, with the checkpoint's own scaling.

    Megatron-Core's Llama-3 scaling has constants built in; these come from config.json ("llama3":
    Llama 3.1 model card; "linear": position interpolation).
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    plain = 1.0 / arch.rope_theta**exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return plain
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return plain / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    turns = context * plain / (2 * torch.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / factor


def build_chunks(arch: Architecture, config: Config, native: TransformerConfig) -> list[GPTModel]:
    """The model chunks of this rank, one per virtual stage, with weights not yet set."""
    parallel, pp_rank = config.parallel, mpu.get_pipeline_model_parallel_rank()
    chunks = []
    for virtual in range(parallel.vpp):
        stage = virtual if parallel.vpp > 1 else None
        first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = GPTModel(
            config=native,
            transformer_layer_spec=block_spec(  # type: ignore[arg-type]
                native, qk_norm=arch.qk_norm, vp_stage=stage, pp_rank=pp_rank
            ),
            # The unembedding that a value head stands in for is a row, or the embedding
            vocab_size=padded_vocab_size(arch, parallel.tp)
            if first or not arch.value_head
            else parallel.tp,
            max_sequence_length=arch.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied or (arch.value_head and first and last),
            position_embedding_type="rope",
            rotary_base=int(arch.rope_theta),
            vp_stage=stage,
        )
        if arch.value_head and last:
            chunk.share_embeddings_and_output_weights = False
            chunk.output_layer = ValueHead(arch.hidden_size, native.params_dtype)  # type: ignore[assignment]
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(arch).to(cpu.device())
        chunks.append(chunk.to(cpu.device()))
    return chunks


class ValueHead(nn.Module):
    """One number from a hidden state, in fp32. Every tensor-parallel rank has all of it and
    computes the same, so its gradient is the same on all of them: nothing is to be summed.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, hidden]` -> `[rows]`."""
        return F.linear(rows.float(), self.weight.float()).squeeze(-1)


def unembedding(chunk: GPTModel) -> Tensor:
    """E, this rank's rows `[vocab shard, hidden]`, on the last stage."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    weight = chunk.output_layer.weight
    assert weight is not None, "only a tied unembedding on the first stage has no weight of its own"
    return weight


def rows_for_unembedding(hidden: Tensor, rows: Tensor, *, sequence_parallel: bool) -> Tensor:
    """The hidden states at `rows` (flat indices into `[tokens, batch]`), `[rows, hidden]`.

    `hidden` is the decoder's output `[tokens, batch, hidden]` (under sequence parallelism this
    rank's tokens). The backward pass sums the tensor-parallel ranks' shares of the gradient:
    Megatron's reduction silently leaves out a gradient that is not contiguous, so rows are picked
    in the order the memory has.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden.flatten(0, 1).index_select(0, rows)


def rows_for_value_head(hidden: Tensor, rows: Tensor, *, sequence_parallel: bool) -> Tensor:
    """The same for a value head. Tensor-parallel ranks compute the same values of the same rows, so
    each has the whole gradient: not a share of it that would have to be summed.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.flatten(0, 1).index_select(0, rows)


def last_chunk(chunks: Sequence[GPTModel]) -> GPTModel | None:
    """The chunk that unembeds, where this rank has it."""
    return next((chunk for chunk in chunks if chunk.post_process), None)
