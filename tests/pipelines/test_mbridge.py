"""A model that mbridge built and filled has the internal policies that `score` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig

from megatron_bupo.pipelines import attach
from tests.pipelines import scores
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("mbridge", reason="mbridge, which builds the model, is not installed")


def _build(model_dir: Path) -> list[Any]:
    """This rank's chunks, made of plain modules; mbridge knows Transformer Engine's names."""
    from mbridge import AutoBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    hf_config: Any = AutoConfig.from_pretrained(model_dir)
    hf_config.rope_theta = hf_config.rope_parameters["rope_theta"]  # mbridge reads transformers 4's
    bridge: Any = AutoBridge.from_config(hf_config, dtype=torch.float32)
    bridge.set_extra_args(
        use_cpu_initialization=True,
        sequence_parallel=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        qk_layernorm=bridge.config.qk_layernorm, normalization="RMSNorm"
    )
    bridge.has_vp_stage = True
    bridge._get_transformer_layer_spec = lambda *_: spec
    named = bridge._weight_name_mapping_mcore_to_hf

    def by_plain_name(name: str) -> list[str]:
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        return named(name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"))

    bridge._weight_name_mapping_mcore_to_hf = by_plain_name
    with torch.no_grad():
        return bridge.get_model(weight_path=str(model_dir), bf16=False)


def _score(model_dir: Path, layout: dict[str, int]) -> list[Tensor]:
    scores.join(layout)
    chunks = _build(model_dir)
    return scores.by_model(chunks, attach(chunks, scores.SCHEDULE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [("qwen2", True, scores.TP2_PP2), ("qwen3", False, scores.TP2_PP2_VPP2)],
    ids=["tied TP2 PP2", "untied TP2 PP2 VPP2"],
)
def test_internal_policies_of_a_model_by_mbridge_are_those_of_score(
    family: str,
    tied: bool,
    layout: dict[str, int],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    model_dir = tiny_model_dir(**scores.MODEL, family=family, tied=tied)
    known = scores.by_command(model_dir, tmp_path)
    for found in run_ranks(4, _score, model_dir, layout):
        for ours, theirs in zip(known, found, strict=True):
            assert (ours - theirs).abs().max() < 1e-6
