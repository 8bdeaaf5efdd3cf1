"""HF -> torch_dist -> HF: every family under every layout, bit for bit and key for key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bupo.cli import main
from tests.tiny_models import LLAMA3_ROPE

pytestmark = pytest.mark.slow

# 67 ids are padded by every even number of ranks.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 tied": {"family": "qwen3", "tied": True},
    "qwen3_moe": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "llama with llama3 RoPE and biases": {"family": "llama", "rope": LLAMA3_ROPE, "bias": True},
    "llama tied, as SmolLM2": {"family": "llama", "tied": True, "rope": {"rope_theta": 1e5}},
}
LAYOUTS = ("", "tp=2", "pp=2", "tp=2 pp=2")
MOE_LAYOUTS = (*LAYOUTS, "ep=2", "tp=2 ep=2 etp=1 pp=2")


def in_bfloat16(model_dir: Path, out: Path) -> Path:
    """The same checkpoint, rounded."""
    shutil.copytree(model_dir, out)
    weights = {n: t.bfloat16() for n, t in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_comes_back_bit_equal_under_every_layout(
    name: str, dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    hf = tiny_model_dir(vocab=67, **MODELS[name])
    if dtype == "bfloat16":
        hf = in_bfloat16(hf, tmp_path / "hf")
    theirs = load_file(hf / "model.safetensors")
    layouts = MOE_LAYOUTS if name == "qwen3_moe" else LAYOUTS
    for i, layout in enumerate(layouts if dtype == "float32" else layouts[-1:]):
        megatron, back = tmp_path / f"megatron{i}", tmp_path / f"back{i}"
        sizes = [f"parallel.{size}" for size in layout.split()]
        there = ["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(megatron), *sizes]
        assert main(there) == 0, layout
        again = ["convert", "megatron-to-hf", "--megatron", str(megatron), "--out", str(back)]
        assert main(again) == 0, layout
        ours = load_file(back / "model.safetensors")
        assert ours.keys() == theirs.keys(), layout
        for tensor_name, tensor in theirs.items():
            assert ours[tensor_name].dtype == tensor.dtype
            assert torch.equal(ours[tensor_name], tensor), (layout, tensor_name)
        for file in ("config.json", "generation_config.json"):
            kept, given = (json.loads((folder / file).read_text()) for folder in (back, hf))
            assert kept == given, layout
