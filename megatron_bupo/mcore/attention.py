"""Attention within packed rows: each token sees the tokens before it in its own sequence.

Rotary embeddings are looked up by each token's position in its sequence, once for all layers, so
layers handle a packed row like any other. Only core attention asks where sequences end: Transformer
Engine's kernels know packing; torch's, which run everywhere, are given rectangles of sequences of
like length, while norms, MLPs and unembedding see no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.extensions import transformer_engine as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_bupo.mcore.packed import PackedRow


class PackedRotary(nn.Module):
    """RoPE's angles for the tokens of a packed row, in the place of Megatron's RotaryEmbedding."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies

    def get_rotary_seq_len(self, *args: Any, **_: Any) -> Tensor:
        """What GPTModel calls this module with: the positions, where Megatron's has a length."""
        row = args[4]
        assert isinstance(row, PackedRow), "rows are packed"
        return row.positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        """`[tokens, 1, 1, head_dim]`, radians in fp32."""
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def use_packed_rows(chunks: Sequence[Any]) -> None:
    """Let GPTModel `chunks` turn each token by its position in its own sequence."""
    for chunk in chunks:
        if chunk.position_embedding_type == "rope":
            chunk.rotary_pos_emb = PackedRotary(chunk.rotary_pos_emb.inv_freq)


class PackedAttention(nn.Module):
    """Core attention by torch's fused kernel, which never holds a `[tokens, tokens]` matrix of
    scores.

    query `[tokens, 1, heads, head_dim]`, key and value with the (fewer) key-value heads
    -> `[tokens, 1, heads * head_dim]`, of this rank's tokens. Under context parallelism keys and
    values of all ranks are gathered.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale, self.dropout = softmax_scale, config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None = None,  # rows are causal by themselves
        *,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        row = packed_seq_params
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if mpu.get_context_parallel_world_size() > 1:
            group = mpu.get_context_parallel_group()
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=group)
                for x in (key, value)
            )
        parts = [query[:0]]
        for rectangle in row.rectangles:
            q = _batched(query, rectangle.queries)
            k, v = (_batched(x, rectangle.keys) for x in (key, value))
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=rectangle.mask,
                is_causal=rectangle.mask is None,
                scale=self.softmax_scale,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        read = torch.cat(parts).index_select(0, row.read).flatten(1)
        return F.pad(read, (0, 0, 0, row.tokens - len(read))).unsqueeze(1)


def _batched(tokens: Tensor, at: Tensor) -> Tensor:
    """`[tokens, heads, size]` at `[sequences, tokens]` -> `[sequences, heads, tokens, size]`."""
    # Indexing by brackets would do the same; its backward is slower by half.
    return tokens.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)


class PackedTEAttention(te.TEDotProductAttention if te.HAVE_TE else nn.Module):  # type: ignore[misc]
    """Transformer Engine's core attention, told of packing in its own words; shapes as above."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedRow,
        **kwargs: Any,
    ) -> Tensor:
        row = packed_seq_params
        rest = row.tokens * mpu.get_context_parallel_world_size() - sum(row.lengths)
        lengths = torch.tensor([*row.lengths, *([rest] if rest else [])], device=query.device)
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = max((*row.lengths, rest))
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        out = super().forward(query, key, value, *args, packed_seq_params=packed, **kwargs)
        return out.flatten(1).unsqueeze(1)
