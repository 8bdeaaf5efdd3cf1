from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.mcore.model import inverse_frequencies
from tests.dense import dense_model
from tests.tiny_models import LLAMA3_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
        LLAMA3_ROPE | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    ],
    ids=["default", "linear", "llama3", "llama3 with other constants"],
)
def test_rope_turns_as_transformers_turns_it(
    rope: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    model_dir = tiny_model_dir(family="llama", head_dim=32, rope=rope)
    ours = inverse_frequencies(read_architecture(model_dir))
    theirs = dense_model(model_dir).model.rotary_emb.inv_freq
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(ours, plain) == ("rope_type" not in rope)
