"""The plain norm against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from megatron_bupo.mcore.spec import RMSNorm


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
