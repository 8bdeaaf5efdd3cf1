"""The plain modules against transformers' norm and a loop over attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from megatron_bupo.mcore.spec import CausalAttention, RMSNorm


class Native:
    """What the modules read of Megatron's TransformerConfig."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_computes_what_transformers_computes(dtype: torch.dtype):
    config: Any = Native(params_dtype=dtype, sequence_parallel=True)
    ours, theirs = RMSNorm(config, 16, eps=1e-5), Qwen3RMSNorm(16, eps=1e-5).to(dtype)
    weight, x = torch.randn(16).to(dtype), (10 * torch.randn(3, 5, 16)).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    torch.testing.assert_close(
        ours(x), theirs(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=0
    )
    assert ours.weight.sequence_parallel


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_looks_back_and_shares_key_value_heads(kv_heads: int):
    tokens, responses, heads, size = 5, 2, 4, 3
    attention = CausalAttention(Native(attention_dropout=0.0), softmax_scale=0.3)  # type: ignore[arg-type]
    query = torch.randn(tokens, responses, heads, size)
    key, value = torch.randn(2, tokens, responses, kv_heads, size)
    out = attention(query, key, value, None).view(tokens, responses, heads, size)
    for t in range(tokens):
        for response in range(responses):
            for head in range(heads):
                group = head * kv_heads // heads
                scores = 0.3 * key[: t + 1, response, group] @ query[t, response, head]
                expected = scores.softmax(0) @ value[: t + 1, response, group]
                torch.testing.assert_close(out[t, response, head], expected)
    with pytest.raises(NotImplementedError, match="no attention mask"):
        attention(query, key, value, torch.ones(1))
