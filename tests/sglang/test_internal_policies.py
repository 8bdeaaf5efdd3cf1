"""Internal policies, sampled from real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.bed import chain_sums
from megatron_bupo.config import Config, load_config
from megatron_bupo.engines import rollout_engine
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.rollout.internal_policies import serving_internal_policies
from megatron_bupo.rollout.weights import StoredWeights
from megatron_bupo.types import Prompt, RolloutGroup, Sampling
from tests.dense import dense_logits, dense_model
from tests.sglang.real import sglang_settings
from tests.tiny_models import LLAMA3_ROPE

pytestmark = [pytest.mark.real, pytest.mark.slow]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tied": True},
    "qwen3": {},
    "qwen3_moe": {},
    "llama": {"rope": LLAMA3_ROPE},
}
INTERNAL = [InternalLayerPolicy(layer, norm) for layer in (1, 2, 3) for norm in (False, True)]
TEXTS = ("1+2=", "7", "9+9+9+9+9=", "8+8+8=>1")
PROMPTS = [Prompt(i, tuple(chain_sums.encode(text)), "", text) for i, text in enumerate(TEXTS)]
SAMPLING = Sampling(responses_per_prompt=2, max_response_tokens=12, temperature=0.8, seed=3)
GREEDY = Sampling(responses_per_prompt=1, max_response_tokens=12, temperature=0.0, seed=0)


@contextmanager
def engine_of(
    model_dir: Path, run_dir: Path, adapted: Callable[[Config], Config]
) -> Iterator[RolloutEngine]:
    needed = [f"model.path={model_dir}", "data.train=x", "sync.mode=http"]
    config = adapted(load_config(None, [*needed, *sglang_settings()]))
    chain_sums.save_tokenizer(model_dir)
    engine = rollout_engine(
        config,
        read_architecture(str(model_dir)),
        AutoTokenizer.from_pretrained(model_dir),
        run_dir=run_dir,
    )
    try:
        engine.wait_until_up(print)
        yield engine
    finally:
        engine.close()


def as_it_is(config: Config) -> Config:
    return config


def farthest_from_dense(model: Any, groups: Sequence[RolloutGroup], policy: Policy) -> float:
    """The largest error of a log-prob, in nats."""
    errors = []
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        ids = torch.tensor([[*rollout.prompt.input_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = dense_logits(model, ids, policy)[0, :-1].double() / SAMPLING.temperature
        dense = logits.log_softmax(-1)[len(rollout.prompt.input_ids) - 1 :]
        picked = dense[range(len(rollout.response_ids)), list(rollout.response_ids)]
        errors.append((torch.tensor(rollout.rollout_logprobs) - picked).abs().max())
    return float(max(errors))


def greedy(engine: RolloutEngine) -> list[tuple[Any, Any]]:
    """One prompt at a time: sums are made in the order that the shapes of a batch suggest."""
    return [
        (rollout.response_ids, rollout.rollout_logprobs)
        for prompt in PROMPTS
        for group in engine.generate([prompt], GREEDY)
        for rollout in group.rollouts
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_come_from_the_internal_policy_whatever_weights_come_meanwhile(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], family: str
):
    knobs = {"family": family, "vocab": 16, "scale": 0.15, **FAMILIES[family]}
    model_dir, other_dir = tiny_model_dir(**knobs), tiny_model_dir(**knobs, seed=5)
    dense, other = dense_model(model_dir), dense_model(other_dir)
    with engine_of(model_dir, tmp_path, serving_internal_policies) as engine:
        before = greedy(engine)
        for policy in (FULL, *INTERNAL):
            engine.sample_from(policy)
            groups = engine.generate(PROMPTS, SAMPLING)
            assert farthest_from_dense(dense, groups, policy) < 1e-5
            assert policy == FULL or farthest_from_dense(dense, groups, FULL) > 0.1
        engine.sample_from(FULL)
        assert greedy(engine) == before
        policy = InternalLayerPolicy(2)
        engine.sample_from(policy)
        engine.load_weights(StoredWeights(other_dir), version=1)
        groups = engine.generate(PROMPTS, SAMPLING)
        assert farthest_from_dense(other, groups, policy) < 1e-5
        engine.sample_from(FULL)
        assert farthest_from_dense(other, engine.generate(PROMPTS, SAMPLING), FULL) < 1e-5


def test_a_server_that_cannot_says_so_and_ours_is_sglangs_own_until_it_is_switched(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
):
    model_dir = tiny_model_dir(vocab=16, scale=0.15)
    with engine_of(model_dir, tmp_path / "own", as_it_is) as engine:
        own = greedy(engine)
        with pytest.raises(InputError, match="cannot sample from internal policies; start it with"):
            engine.sample_from(InternalLayerPolicy(2))

    with engine_of(model_dir, tmp_path / "ours", serving_internal_policies) as engine:
        assert greedy(engine) == own
        with pytest.raises(InputError, match="does not sample from the policy internal layer 9"):
            engine.sample_from(InternalLayerPolicy(9))
        engine.sample_from(FULL)
        assert greedy(engine) == own
    log = (tmp_path / "ours" / "servers" / "server-0.log").read_text()
    assert "internal layer 9 is not sampled from: the model has 4 layers" in log
