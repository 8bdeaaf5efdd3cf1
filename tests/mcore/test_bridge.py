"""Models by Megatron-Bridge: Mistral, which our table does not know, and our own families.

Megatron-Bridge imports Transformer Engine, which needs CUDA to build; where that is missing an
empty package of its name stands in while the bridge is imported, and nothing of it is called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.checkpoints import checkpoint_dir
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.schema import BupoConfig, ParallelConfig
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.hf_weights import units
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import check_model
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    another_trainer,
    random_batch,
    run_config,
    snapshot,
    train_once,
    with_stale_logprobs,
)
from tests.ranks import RankError, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config.schema import Config
    from tests.dense import DenseUpdate

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)


class _Empty(types.ModuleType):
    """A package that has every name: a class if it begins with a capital, else a package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {}) if name[0].isupper() else _Empty(name)


def _import_bridge() -> Any:
    names = ["transformer_engine", "transformer_engine.pytorch"]
    if importlib.util.find_spec(names[0]) is None:
        for name in names:
            sys.modules[name] = _Empty(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[names[0]].pytorch = sys.modules[names[1]]  # type: ignore[attr-defined]
    else:
        names = []
    from megatron_bupo.mcore import bridge

    for name in names:
        del sys.modules[name]
    return bridge


bridge = _import_bridge()
pytestmark = pytest.mark.slow

SIZES = {"vocab": 68, "scale": 0.12}
MISTRAL = SIZES | {"family": "mistral", "sliding_window": None}
INTERNAL = InternalLayerPolicy(2)
POLICIES = [FULL, *(InternalLayerPolicy(n, norm) for n in (1, 2, 3) for norm in (False, True))]
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tp": 2}),
    "VPP2 PP2": (2, {"pp": 2, "vpp": 2}),
    "DP2 distributed optimizer": (2, {"dp": 2, "distributed_optimizer": True}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 PP2 SP": (4, {"tp": 2, "pp": 2, "sp": True}),
}


def _config(model_dir: Path, layout: dict[str, Any]) -> Config:
    return run_config(model={"path": str(model_dir)}, parallel=layout)


def _trainer(config: Config) -> MegatronTrainer:
    """A trainer whose model comes through the bridge, whatever its architecture."""

    def no_slice(name: str) -> Any:
        raise AssertionError(f"the bridge reads {name} itself")

    return MegatronTrainer(bridge.read_sizes(config), config, no_slice)


def _measure(config: Config, expected: dict[Policy, DenseUpdate], run_dir: Path) -> dict[str, Any]:
    """On each rank: what comes out of the model before, during and after two updates."""
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    trainer, batch = _trainer(config), random_batch(vocab=68)
    seen: dict[str, Any] = {"weights": snapshot(trainer), "gaps": []}
    for policy, dense in expected.items():
        logprobs, entropies = trainer.logprobs(batch, policy)
        stale = with_stale_logprobs(batch, dense.logprobs)
        metrics = trainer.update(stale, policy, lr=0.0).metrics
        seen["gaps"].append(
            {
                "logprobs": float((logprobs - dense.logprobs).abs().max()),
                "entropies": float((entropies - dense.entropies).abs().max()),
                "loss": abs(metrics["update/loss"] - dense.loss),
                "grad_norm": abs(metrics["update/grad_norm"] / dense.grad_norm - 1),
            }
        )
    train_once(trainer, batch, INTERNAL, lr=1e-2)
    seen["after internal"] = snapshot(trainer)
    seen["sent"] = {name: tensor.clone() for name, tensor in trainer.changed_weights(INTERNAL)}
    checkpoint.save(trainer, run_dir, 1, {}, keep=1)
    train_once(trainer, batch, FULL, lr=1e-2)
    seen["after full"] = snapshot(trainer)
    resumed = _trainer(config)
    checkpoint.load(resumed, checkpoint_dir(run_dir, 1))
    train_once(resumed, batch, FULL, lr=1e-2)
    seen["after resume"] = snapshot(resumed)
    return seen


@pytest.mark.parametrize(
    ("name", "tied"),
    [(name, tied) for name in LAYOUTS for tied in (False, True) if not (tied and "VPP" in name)],
)
def test_mistral_equals_transformers_and_trains(
    name: str, tied: bool, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    ranks, layout = LAYOUTS[name]
    model_dir = tiny_model_dir(**MISTRAL, tied=tied)
    model, batch, expected = dense_model(model_dir), random_batch(vocab=68), {}
    for policy in POLICIES:
        logprobs, _ = dense_logprobs(model, batch, policy)
        stale = with_stale_logprobs(batch, logprobs.detach())
        expected[policy] = dense_update(model, stale, policy)
    stored = load_file(model_dir / "model.safetensors")
    above = {n for n in stored if n == "model.norm.weight" or n.startswith(ABOVE)}
    for seen in run_ranks(ranks, _measure, _config(model_dir, layout), expected, tmp_path):
        _equal(seen["weights"], stored)
        for gap in seen["gaps"]:
            assert gap["logprobs"] < 1e-5
            assert gap["entropies"] < 1e-5
            assert gap["loss"] < 1e-6
            assert gap["grad_norm"] < 1e-5
        assert _moved(stored, seen["after internal"]) == set(stored) - above
        _equal(seen["sent"], {n: seen["after internal"][n] for n in set(stored) - above})
        assert _moved(seen["after internal"], seen["after full"]) == set(stored)
        _equal(seen["after resume"], seen["after full"])


ABOVE = ("model.layers.2.", "model.layers.3.")  # what INTERNAL does not reach, of four layers


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not _moved(ours, theirs)


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def _both_ways(model_dir: Path, layout: dict[str, Any]) -> dict[str, Any]:
    config = _config(model_dir, layout)
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    by_table, by_bridge = another_trainer(model_dir, config), _trainer(config)
    loaded = [dict(t.gpt_chunks[0].named_parameters()) for t in (by_table, by_bridge)]
    _equal(*loaded)
    for name, parameter in loaded[0].items():
        marks = [getattr(p, "partition_dim", -1) for p in (parameter, loaded[1][name])]
        assert marks[0] == marks[1], name
    train_once(by_table, random_batch(vocab=68), FULL, lr=1e-2)
    mine = bridge.AutoBridge.from_hf_pretrained(str(model_dir))
    stream = bridge.BridgeStream(mine, by_table.gpt_chunks, by_table.arch)
    assert stream.unit_of == by_table.weights.unit_of
    return {
        unit: [
            {name: t.clone() for name, t in weights.tensors([unit])}
            for weights in (by_table.weights, stream)
        ]
        for unit in units(by_table.arch)
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_bridge_and_our_table_agree_on_every_tensor(
    family: str, tied: bool, tiny_model_dir: Callable[..., Path]
):
    model_dir = tiny_model_dir(**SIZES, family=family, tied=tied)
    for seen in run_ranks(4, _both_ways, model_dir, LAYOUTS["TP2 PP2"][1]):
        for by_table, by_bridge in seen.values():
            _equal(by_table, by_bridge)


def _refusal(config: Config) -> str:
    with pytest.raises(InputError) as refused:
        bridge.read_sizes(config)
    return str(refused.value)


def test_what_the_bridge_or_our_actor_cannot_do_is_refused_before_anything_starts(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    tied = tiny_model_dir(**MISTRAL, tied=True)
    assert "parallel.vpp=2" in _refusal(_config(tied, {"pp": 2, "vpp": 2}))
    assert "parallel.tp=3" in _refusal(_config(tied, {"tp": 3}))
    own = replace(_config(tied, {}), bupo=BupoConfig(internal_layout=ParallelConfig()))
    assert "bupo.internal_layout" in _refusal(own)
    windowed = tiny_model_dir(**MISTRAL | {"sliding_window": 8})
    assert "window_size=[8, 0], which only Transformer Engine" in _refusal(_config(windowed, {}))
    for model_type, architecture, reason in [
        ("gpt2", "GPT2LMHeadModel", "not supported by AutoBridge"),
        ("qwen3_moe", "Qwen3MoeForCausalLM", "num_moe_experts=128"),
        ("gemma", "GemmaForCausalLM", "layernorm_zero_centered_gamma=True"),
    ]:
        raw = {"model_type": model_type, "architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert reason in _refusal(_config(tmp_path, {}))


def test_preflight_reads_a_known_family_itself_and_asks_the_bridge_for_the_rest(
    tiny_model_dir: Callable[..., Path],
):
    ours = check_model(_config(tiny_model_dir(**SIZES, family="llama"), {}), training=False)
    assert isinstance(ours, Architecture)
    theirs = check_model(_config(tiny_model_dir(**MISTRAL), {}), training=False)
    assert theirs == DecoderSizes(
        family="MistralForCausalLM",
        layers=4,
        ffn_size=48,
        heads=4,
        kv_heads=2,
        vocab_size=68,
        tied=False,
        max_positions=256,
    )


def _load(config: Config) -> None:
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    bridge.load(bridge.read_sizes(config), config)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("lack", "nothing for the parameter decoder.layers.1.mlp.linear_fc2.weight"),
        ("extra", "no parameter takes the checkpoint's model.layers.4.mlp.down_proj.weight"),
    ],
)
def test_a_checkpoint_whose_tensors_do_not_pair_up_is_refused(
    change: str, complaint: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(**MISTRAL)
    tensors = load_file(model_dir / "model.safetensors")
    moved = tensors["model.layers.1.mlp.down_proj.weight"]
    if change == "lack":
        del tensors["model.layers.1.mlp.down_proj.weight"]
    else:
        tensors["model.layers.4.mlp.down_proj.weight"] = moved.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(RankError, match=complaint):
        run_ranks(1, _load, _config(tmp_path, {}))
