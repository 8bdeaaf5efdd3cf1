from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, LLAMA3_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.arange(24)[None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_tiny_model_is_opinionated_and_reads_its_context(
    tiny_model_dir: Callable[..., Path], family: str, tied: bool
):
    path = tiny_model_dir(family=family, tied=tied)
    logits = _logits(path)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.2 < entropy.mean() < 3.5  # ln 64 is 4.16: far from flat, and far from one-hot
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert all((p - 1).abs().max() > 0.05 for p in norms)


def test_biases_and_rope_change_what_a_tiny_model_says(tiny_model_dir: Callable[..., Path]):
    plain = _logits(tiny_model_dir(family="llama"))
    assert (plain - _logits(tiny_model_dir(family="llama", rope=LLAMA3_ROPE))).abs().max() > 0.01
    names = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family="llama", bias=True))
    assert sum(name.endswith(".bias") for name in names.state_dict()) == 4 * 7


def test_equal_knobs_give_equal_weights(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    from tests.tiny_models import make_tiny_model

    first = tiny_model_dir(family="qwen2", seed=3)
    again = make_tiny_model(tmp_path, family="qwen2", seed=3)
    files = [path / "model.safetensors" for path in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert tiny_model_dir(seed=3, family="qwen2") == first
