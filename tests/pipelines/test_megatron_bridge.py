"""A model that Megatron-Bridge built, with a hook of ours, has the policies that `score` reads."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines import PhaseSchedule
from megatron_bupo.pipelines.megatron_bridge import follow
from tests.pipelines import scores
from tests.pipelines.tiny_gpt import known_gpt
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

needs_the_bridge = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed"
)


def _plain_layers(config: Any, **_: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")


def _score(model_dir: Path, layout: dict[str, int]) -> list[Tensor]:
    importlib.import_module("tests.mcore.test_bridge")  # with an empty Transformer Engine
    from examples.megatron_bridge_bupo import build

    scores.join(layout)
    settings = {
        "tensor_model_parallel_size": layout["tp"],
        "pipeline_model_parallel_size": layout["pp"],
        "virtual_pipeline_model_parallel_size": layout.get("vpp"),
        "overlap_p2p_comm": "vpp" in layout,
        "batch_p2p_comm": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "transformer_layer_spec": _plain_layers,
    }
    return scores.by_model(*build(str(model_dir), scores.SCHEDULE, **settings))


@needs_the_bridge
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "layout"),
    [(True, scores.TP2_PP2), (False, scores.TP2_PP2_VPP2)],
    ids=["tied TP2 PP2", "untied TP2 PP2 VPP2"],
)
def test_internal_policies_of_a_model_by_megatron_bridge_are_those_of_score(
    tied: bool, layout: dict[str, int], tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(**scores.MODEL, family="qwen3", tied=tied)
    known = scores.by_command(model_dir, tmp_path)
    for found in run_ranks(4, _score, model_dir, layout):
        for ours, theirs in zip(known, found, strict=True):
            assert (ours - theirs).abs().max() < 1e-6


class ModelConfig:
    """What releases after 0.3 have instead of a provider, as far as hooks go: a list of them."""

    def __init__(self) -> None:
        self.pre_wrap_hooks: list[Callable[[list[Any]], list[Any]]] = []


def _by_model_config() -> None:
    config = ModelConfig()
    controller = follow(config, PhaseSchedule.of([(2, 1)]))
    gpt, computed = known_gpt()
    [model] = [gpt]
    for hook in config.pre_wrap_hooks:
        [model] = hook([model])
    assert model is gpt
    assert controller.set_step(0) != controller.set_step(1)
    assert computed(model) == "full"
    controller.set_step(0)
    assert computed(model) == "internal layer 2"


def test_a_model_config_has_its_hook_in_a_list():
    run_ranks(1, _by_model_config)


def test_what_takes_no_hook_is_refused():
    with pytest.raises(InputError, match="pre_wrap_hooks"):
        follow(object(), PhaseSchedule.of([(2, 1)]))
