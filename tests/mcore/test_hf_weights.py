"""HF -> Megatron -> HF changes no bit, and another implementation puts every number where we do."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.hf.writer import write_checkpoint
from tests.mcore.actors import run_config, snapshot, start_trainer
from tests.ranks import run_ranks
from tests.tiny_models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODELS = {
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 tied": {"family": "qwen3", "tied": True},
    "qwen3_moe, some layers dense": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "llama with biases": {"family": "llama", "bias": True},
}


def _export(model_dir: Path, out: Path, dtype: str) -> dict[str, Tensor]:
    config = run_config(model={"dtype": dtype}, parallel={"tp": 2, "pp": 2})
    trainer = start_trainer(model_dir, config)
    weights = iter(trainer.all_weights())
    if dist.get_rank() == 0:
        shapes = expected_tensors(trainer.arch)
        write_checkpoint(out, weights, shapes, like=model_dir, dtype=dtype, shard_bytes=20_000)
    for _ in weights:
        pass  # the other ranks' part of the gathering
    return snapshot(trainer)


@pytest.mark.parametrize("knobs", MODELS.values(), ids=MODELS)
def test_a_checkpoint_comes_back_bit_equal_from_tp2_pp2(
    knobs: dict[str, Any], tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    """Also on disk: in several shards, which transformers reads as the same model."""
    model_dir, out = tiny_model_dir(vocab=67, **knobs), tmp_path / "hf"
    stored = load_file(model_dir / "model.safetensors")
    for rank, weights in enumerate(run_ranks(4, _export, model_dir, out, "float32")):
        assert weights.keys() == stored.keys(), rank
        assert all(torch.equal(weights[name], stored[name]) for name in stored), rank
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (out, model_dir))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_bfloat16_weights_come_back_as_they_were_rounded(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir, out = tiny_model_dir(family="qwen3", vocab=67, tied=True), tmp_path / "hf"
    stored = load_file(model_dir / "model.safetensors")
    for weights in run_ranks(4, _export, model_dir, out, "bfloat16"):
        assert all(torch.equal(weights[name], stored[name].bfloat16()) for name in stored)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def _in_transformer_engine(name: str, *, moe: bool) -> str:
    """The names that mbridge knows: a norm is part of the next linear layer, and experts' matrices
    lie side by side.
    """
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if not moe:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return re.sub(r"local_experts\.(\d+)\.(linear_fc.\.weight)", r"\2\1", name)


def _shards(model_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's parameters by their Megatron names: what we loaded, what mbridge would load."""
    from mbridge import AutoBridge

    trainer = start_trainer(model_dir, run_config(parallel={"tp": 2}))
    hf_config: Any = AutoConfig.from_pretrained(model_dir)
    hf_config.rope_theta = hf_config.rope_parameters["rope_theta"]  # mbridge reads transformers 4's
    bridge = AutoBridge.from_config(hf_config, dtype=torch.float32)
    stored = load_file(model_dir / "model.safetensors")
    ours, theirs = {}, {}
    for name, parameter in trainer.gpt_chunks[0].named_parameters():
        known_as = _in_transformer_engine(name, moe="moe" in hf_config.model_type)
        hf_names = bridge._weight_name_mapping_mcore_to_hf(known_as)
        whole = bridge._weight_to_mcore_format(known_as, [stored[n] for n in hf_names])
        cut = bridge._weight_split_across_tp(known_as, whole, parameter, 2)
        ours[name], theirs[name] = parameter.detach(), cut[dist.get_rank()].contiguous()
    return ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shards_are_those_of_mbridge(
    family: str, tied: bool, tiny_model_dir: Callable[..., Path]
):
    pytest.importorskip("mbridge", reason="mbridge, the second implementation, is not installed")
    model_dir = tiny_model_dir(family=family, vocab=66, tied=tied)  # mbridge does not pad by TP
    for ours, theirs in run_ranks(2, _shards, model_dir):
        per_layer = {"qwen2": 7, "qwen3": 8, "qwen3_moe": 7 + 4 * 2, "llama": 6}[family]
        assert len(ours) == 4 * per_layer + (2 if tied else 3)
        for name, shard in ours.items():
            assert torch.equal(shard, theirs[name]), name


def test_the_tables_rows_are_undone_exactly(tiny_model_dir: Callable[..., Path]):
    """`split` undoes `join`, row by row, for numbers that are all different."""
    from megatron_bupo.hf.architecture import read_architecture
    from megatron_bupo.hf.tensors import expected_tensors
    from megatron_bupo.mcore.hf_weights import layer_rows

    for family in FAMILIES:
        arch = read_architecture(tiny_model_dir(family=family, heads=8, kv_heads=2))
        shapes = expected_tensors(arch)
        for row in layer_rows(arch, 1):
            pieces = tuple(
                torch.arange(torch.Size(shapes[f"model.layers.0.{n}"]).numel()).view(
                    shapes[f"model.layers.0.{n}"]
                )
                + 10_000 * i
                for i, n in enumerate(row.hf)
            )
            back = row.split(row.join(pieces, arch), arch)
            assert all(torch.equal(a, b) for a, b in zip(pieces, back, strict=True)), row.hf
