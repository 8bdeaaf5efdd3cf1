"""Whatever the model and the number of GPUs, what is proposed would start, and fits."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from itertools import islice
from pathlib import Path

import pytest

from megatron_bupo.commands.plan import plan_of, recipe_of
from megatron_bupo.planner.changes import as_settings, what_differs
from megatron_bupo.planner.hardware import read_hardware
from megatron_bupo.planner.plan import Recipe
from megatron_bupo.planner.propose import proposals, smallest_change

RECIPE = Path(__file__).parents[2] / "conf" / "bupo_qwen3_8b.yaml"


def random_model(folder: Path, chance: random.Random) -> Path:
    """A config.json alone."""
    experts = chance.random() < 0.4
    family = "Qwen3MoeForCausalLM" if experts else chance.choice(["Qwen3", "Qwen2", "Llama"])
    kv_heads, layers = chance.choice([2, 4, 8]), chance.choice([12, 27, 28, 35, 36, 62, 94])
    config = {
        "architectures": [family if experts else f"{family}ForCausalLM"],
        "hidden_size": 128 * chance.choice([8, 16, 24]),
        "intermediate_size": 256 * chance.choice([12, 24, 37]),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * chance.choice([2, 4, 7]),
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": chance.choice([32000, 151936]),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": chance.random() < 0.3,
        "rope_theta": 1e6,
    }
    if experts:
        config |= {
            "num_experts": chance.choice([8, 60, 128]),
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def asked(model: Path, gpus: int, *overrides: str) -> tuple[Recipe, int]:
    shared = f"servers.count={gpus // 2}"
    settings = [f"model.path={model}", "bupo.target_layer=3", shared, *overrides]
    arguments = {"recipe": str(RECIPE), "overrides": settings, "gpus": gpus}
    return recipe_of(Namespace(**arguments, prompt_tokens=None, response_tokens=None))[0], gpus


@pytest.mark.parametrize("seed", range(3))
def test_proposals_start_and_fit(seed: int, tmp_path: Path):
    chance, hardware = random.Random(seed), read_hardware("H100")
    model, gpus = random_model(tmp_path / "model", chance), chance.choice([8, 12, 16])
    recipe, _ = asked(model, gpus)
    found = list(islice(proposals(recipe, hardware, gpus), 5))
    if (change := smallest_change(recipe, hardware, gpus)) is not None:
        found.append(change)
    for proposal in found:
        settings = as_settings(what_differs(recipe.config, proposal.changes)).split()
        plan = plan_of(asked(model, gpus, *settings)[0], hardware, gpus)
        assert plan.fits
        assert plan.gpus == gpus
        assert plan.full.time == proposal.plan.full.time
