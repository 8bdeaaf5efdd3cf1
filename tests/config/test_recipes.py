"""The paper's runs as recipes: their numbers against the paper's tables, written down again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megatron_bupo.config import Config, flatten, load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.hf.architecture import DecoderSizes

CONF = Path(__file__).parents[2] / "conf"
FAKE = Path(__file__).parents[1] / "fake_sglang"


class Run(NamedTuple):
    """A row of the paper's settings; layers count from 1."""

    name: str
    layer: int
    internal_steps: int
    response_tokens: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


RUNS = [
    Run("qwen3_4b", 6, 30, 8192, 36, 9728, 32, 8, 151936, True),
    Run("qwen3_8b", 6, 20, 8192, 36, 12288, 32, 8, 151936, False),
    Run("octothinker_3b", 27, 20, 3072, 28, 8192, 24, 8, 128256, True),
    Run("octothinker_8b", 31, 20, 3072, 32, 14336, 32, 8, 128256, False),
]
TABLE_8 = {  # and the authors' script, where that says more
    "steps": 300,
    "rollout.prompts_per_step": 128,
    "rollout.responses_per_prompt": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "data.max_prompt_tokens": 1024,
    "algorithm.advantage": "grpo",
    "algorithm.minibatches": 4,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.dual_clip": 10.0,
    "algorithm.loss_aggregation": "token_mean",
    "algorithm.kl_coefficient": 0.0,
    "optimizer.lr": 1e-6,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "optimizer.decay": "constant",
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 100,
    "evaluation.every": 30,
    "evaluation.responses_per_prompt": 1,
    "evaluation.temperature": 1.0,
    "trainer.max_tokens_per_microbatch": 32768,
}


TABLE_8_PPO = {
    "algorithm.gamma": 1.0,
    "algorithm.gae_lambda": 1.0,
    "algorithm.normalize_by_std": True,
    "critic.clip_range": 0.5,
    "critic.warmup_steps": 0,
    "critic.optimizer.lr": 1e-5,
    "critic.optimizer.weight_decay": 0.01,
    "critic.optimizer.clip_grad": 1.0,
}
ADVANTAGES = {"ppo": "gae", "rloo": "rloo", "reinforce_plus_plus": "reinforce_plus_plus"}
LAYER_AWARE = {  # Table 11
    "frozen_lower": {"qwen3_4b": {"1-6": 0.0}, "octothinker_3b": {"1-27": 0.0}},
    "layerwise_lr": {"qwen3_4b": {"7-36": 0.1}, "octothinker_3b": {"28": 0.1}},
}
RECIPES = [(method, run) for method in ("bupo", "grpo", *ADVANTAGES) for run in RUNS]
RECIPES += [(method, run) for method in LAYER_AWARE for run in RUNS[::2]]


def rate_of(layer: int, config: Config) -> float:
    """The factor on a layer's learning rate, by a reading of the keys that is not the package's."""
    for key, factor in config.optimizer.lr_factors.items():
        first, _, last = key.partition("-")
        if int(first) <= layer <= int(last or first):
            return factor
    return 1.0


def recipe(method: str, run: Run) -> Config:
    return load_config(str(CONF / f"{method}_{run.name}.yaml"), [])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_of_the_paper_has_the_papers_numbers(run: Run):
    config = recipe("bupo", run)
    assert {key: flatten(config)[key] for key in TABLE_8} == TABLE_8
    assert config.bupo.phases() == [(run.layer, run.internal_steps)]
    assert config.rollout.max_response_tokens == run.response_tokens
    assert not config.bupo.read_out_norm
    names = [benchmark.name for benchmark in config.evaluation.benchmarks]
    assert names == ["AMC23", "MATH500", "AIME24", "AIME25"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_its_twin_differs_in_the_internal_phase_alone(run: Run):
    bupo, grpo = flatten(recipe("bupo", run)), flatten(recipe("grpo", run))
    changed = {key for key in bupo if bupo[key] != grpo[key]}
    assert changed == {"run_dir", "bupo.target_layer", "bupo.internal_steps"}
    assert recipe("grpo", run).bupo.phases() == []


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_other_methods_differ_from_grpo_in_their_advantage_alone(run: Run):
    grpo = flatten(recipe("grpo", run))
    for method, advantage in ADVANTAGES.items():
        other = flatten(recipe(method, run))
        own = {"run_dir": f"runs/{method}_{run.name}", "algorithm.advantage": advantage}
        if method == "ppo" and run.name.endswith("8b"):  # two models, beside servers on 80 GB
            own |= {"parallel.tp": 4, "sglang.mem_fraction_static": 0.3}
        assert other == grpo | own
        assert method != "ppo" or {key: other[key] for key in TABLE_8_PPO} == TABLE_8_PPO


@pytest.mark.parametrize("run", RUNS[::2], ids=lambda run: run.name)
def test_layer_aware_baselines_differ_from_grpo_in_the_rates_of_layers_alone(run: Run):
    grpo = flatten(recipe("grpo", run))
    for method, rates in LAYER_AWARE.items():
        config = recipe(method, run)
        own = {f"optimizer.lr_factors.{key}": rate for key, rate in rates[run.name].items()}
        assert flatten(config) == grpo | {"run_dir": f"runs/{method}_{run.name}"} | own
        low, high = (0.0, 1.0) if method == "frozen_lower" else (1.0, 0.1)
        assert [rate_of(layer, config) for layer in range(1, run.layers + 1)] == [
            low if layer <= run.layer else high for layer in range(1, run.layers + 1)
        ]


def test_every_recipe_of_the_paper_is_known_here():
    """No file is left out of these tests."""
    texts = {path.stem: path.read_text() for path in CONF.glob("*.yaml")}
    names = {n for n, text in texts.items() if "paper/" in text and "large/" not in text}
    assert names == {f"{method}_{run.name}" for method, run in RECIPES}


@pytest.mark.parametrize(
    ("method", "run"), RECIPES, ids=[f"{method}_{run.name}" for method, run in RECIPES]
)
def test_it_would_start_on_one_node_of_eight(
    method: str, run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(FAKE))  # in place of the SGLang that it would start
    config = recipe(method, run)
    assert check(config, 8).dp == 8 // config.parallel.tp
    sizes = DecoderSizes(
        family="",
        layers=run.layers,
        ffn_size=run.ffn,
        heads=run.heads,
        kv_heads=run.kv_heads,
        vocab_size=run.vocabulary,
        tied=run.tied,
        max_positions=40960,
    )
    check_against_model(config, sizes)


def test_recipes_are_small_and_every_number_of_theirs_has_a_source():
    for path in [CONF / f"{method}_{run.name}.yaml" for method, run in RECIPES]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 15
        delta = yaml.safe_load(path.read_text())
        for key in delta["bupo"] if "bupo" in path.name else ():
            assert "#" in next(line for line in lines if f"{key}:" in line), (path, key)
