"""Native keys that change who holds a layer, or what is kept of it, change no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.layout import Layout, layers_of_stages
from tests.mcore.actors import (
    full_gradients,
    random_batch,
    run_config,
    start_trainer,
    with_stale_logprobs,
)
from tests.ranks import run_ranks

LAYERS = 6
EMBEDDING = {"account_for_embedding_in_pipeline_split": True}
UNEMBEDDING = {"account_for_loss_in_pipeline_split": True}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir) -> Path:
    return tiny_model_dir(family="qwen3", vocab=67, layers=LAYERS, scale=0.12)


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[dict[str, Tensor]]:
    """What one rank finds."""
    ((_, found),) = run_ranks(1, _held_and_found, model_dir, {}, {})
    return found


def _held_and_found(
    model_dir: Path, parallel: dict, megatron: dict
) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
    """The layers of this rank's chunks; log-probs and gradients under three policies."""
    trainer = start_trainer(model_dir, run_config(parallel=parallel, megatron=megatron))
    chunks: list[Any] = trainer.gpt_chunks
    held = [[layer.layer_number for layer in gpt.decoder.layers] for gpt in chunks]
    found = []
    for policy in (InternalLayerPolicy(1), InternalLayerPolicy(4), FULL):
        old, _ = trainer.logprobs(random_batch(), policy)
        trainer.update(with_stale_logprobs(random_batch(), old), policy, lr=0.0)
        found.append({"log-probs": old, **full_gradients(trainer)})
    return held, found


@pytest.mark.parametrize(
    ("pp", "vpp", "megatron"),
    [
        (2, 2, EMBEDDING | UNEMBEDDING),
        pytest.param(4, 1, EMBEDDING | UNEMBEDDING, marks=pytest.mark.slow),
        (2, 1, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        (
            2,
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
            },
        ),
    ],
)
def test_a_layout_holds_the_layers_that_are_told_and_finds_what_one_rank_does(
    model_dir: Path, expected: list[dict[str, Tensor]], pp: int, vpp: int, megatron: dict
):
    told = layers_of_stages(LAYERS, Layout(1, pp, vpp, 1, pp), megatron)
    ranks = run_ranks(pp, _held_and_found, model_dir, {"pp": pp, "vpp": vpp}, megatron)
    assert [held for held, _ in ranks] == [[list(chunk) for chunk in chunks] for chunks in told]
    for _, found in ranks:
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
