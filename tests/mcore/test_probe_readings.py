"""What a probe reads on the model that trains, beside transformers under every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.mcore.probe_readings import ProbeReader
from tests.dense import dense_model
from tests.dense_readings import dense_probe
from tests.mcore.actors import random_batch, run_config, start_trainer
from tests.mcore.parity_cases import LLAMA, MOE, QWEN2, QWEN3, RECOMPUTE, SPARSE
from tests.ranks import run_ranks

# Logits of 13 rows hold a few tokens of all later layers, and micro-batches are many
SMALL = {"trainer": {"logprob_chunk_tokens": 13, "max_tokens_per_microbatch": 24}}
LAYER = 2  # of 4; two stages have two each

CASES = {
    "qwen3, one rank": (QWEN3, 1, {}),
    "qwen2, tp2": (QWEN2, 2, {"parallel": {"tp": 2}}),
    "llama, pp2, distributed optimizer": (
        LLAMA | {"bias": True},
        4,
        {"parallel": {"pp": 2, "distributed_optimizer": True}},
    ),
    "tied qwen3, tp2 pp2 sp": (
        QWEN3 | {"tied": True},
        4,
        {"parallel": {"tp": 2, "pp": 2, "sp": True}},
    ),
    "llama, cp2, recompute": (LLAMA, 2, {"parallel": {"cp": 2}, "megatron": RECOMPUTE}),
    "experts, pp2 vpp2": (MOE | SPARSE, 2, {"parallel": {"pp": 2, "vpp": 2}}),
}


def _probe(model_dir: Path, sections: dict[str, Any]) -> tuple[Any, int]:
    """What is read of layers 1 and 2, and how many hooks stay in the model."""
    trainer = start_trainer(model_dir, run_config(**SMALL | sections))
    batch = random_batch()
    found = {layer: vars(ProbeReader(trainer, layer).read(batch)) for layer in (1, LAYER)}
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for chunk in trainer.gpt_chunks
        for layer in chunk.decoder.layers
        for m in [layer, *layer.children()]
    )
    return found, hooks


@pytest.mark.parametrize("case", CASES)
def test_a_probe_reads_what_transformers_does(tiny_model_dir: Callable[..., Path], case: str):
    shape, world, sections = CASES[case]
    model_dir = tiny_model_dir(**shape)
    for found, hooks in run_ranks(world, _probe, model_dir, sections):
        assert hooks == 0
        for layer, readings in found.items():
            expected = dense_probe(dense_model(model_dir), random_batch(), layer)
            assert readings.keys() == expected.keys()
            for name, values in expected.items():
                assert readings[name].shape == values.shape, name
                gap = (readings[name].double() - values).abs().max()
                assert gap < 1e-4, f"{name} at layer {layer}: {gap}"
