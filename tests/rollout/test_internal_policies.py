"""Internal policies are sampled: from the embedded engine, and what makes servers do it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.bed import chain_sums
from megatron_bupo.config import Config, load_config
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.client import ServerClient
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.rollout.internal_policies import (
    is_switchable,
    samples_from,
    serving_internal_policies,
    switch_tensors,
)
from megatron_bupo.types import Prompt, RolloutGroup, Sampling
from tests.dense import dense_logits, dense_model
from tests.rollout.fake import fake_server
from tests.tiny_models import LLAMA3_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.slow

LAYERS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "llama": {"family": "llama", "rope": LLAMA3_ROPE, "bias": True},
    "sliding window above layer 2": {"family": "qwen2", "use_sliding_window": True}
    | {"sliding_window": 5, "max_window_layers": 2},
}
INTERNAL = [
    InternalLayerPolicy(layer, norm) for layer in range(1, LAYERS) for norm in (False, True)
]
SAMPLING = Sampling(responses_per_prompt=2, max_response_tokens=12, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    chain_sums.save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(i, tuple(chain_sums.encode(text)), "", text) for i, text in enumerate(texts)]


PROMPTS = prompts_of("1+2=", "7", "9+9+9+9+9=", "8+8+8=>1")


def said(groups: Sequence[RolloutGroup]) -> list[tuple[Any, Any]]:
    return [(r.response_ids, r.rollout_logprobs) for group in groups for r in group.rollouts]


def farthest_from_dense(model: Any, groups: Sequence[RolloutGroup], policy: Policy) -> float:
    """The largest error of a log-prob or an entropy, in nats."""
    errors = []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([[*group.prompt.input_ids, *rollout.response_ids]])
            with torch.no_grad():
                logits = dense_logits(model, ids, policy)[0, :-1].double() / SAMPLING.temperature
            dense = logits.log_softmax(-1)[len(group.prompt.input_ids) - 1 :]
            picked = dense[range(len(rollout.response_ids)), list(rollout.response_ids)]
            entropy = -(dense.exp() * dense).sum(-1)
            errors.append((torch.tensor(rollout.rollout_logprobs) - picked).abs().max())
            errors.append((torch.tensor(rollout.entropies) - entropy).abs().max())
    return float(max(errors))


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_come_from_the_internal_policy_and_say_its_logprobs(
    tiny_model_dir: Callable[..., Path], tokenizer: Any, family: str
) -> None:
    model_dir = tiny_model_dir(vocab=16, scale=0.15, **FAMILIES[family])
    engine, dense = EmbeddedEngine(model_dir, tokenizer, batch_size=5), dense_model(model_dir)
    full = engine.generate(PROMPTS, SAMPLING)
    for policy in INTERNAL:
        engine.sample_from(policy)
        groups = engine.generate(PROMPTS, SAMPLING)
        assert farthest_from_dense(dense, groups, policy) < 1e-5
        assert farthest_from_dense(dense, groups, FULL) > 0.1
    engine.sample_from(FULL)
    assert said(engine.generate(PROMPTS, SAMPLING)) == said(full)


def test_layers_above_the_policy_do_not_run(
    tiny_model_dir: Callable[..., Path], tokenizer: Any
) -> None:
    engine = EmbeddedEngine(tiny_model_dir(vocab=16), tokenizer, batch_size=64)
    ran: set[int] = set()
    for number, layer in enumerate(engine.model.model.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.add(number))
    for policy in (InternalLayerPolicy(2), InternalLayerPolicy(1, read_out_norm=True), FULL):
        engine.sample_from(policy)
        ran.clear()
        engine.generate(PROMPTS[:1], SAMPLING)
        assert ran == set(range(1, getattr(policy, "layer", LAYERS) + 1))


def test_weights_loaded_meanwhile_reach_the_layers_that_do_not_run(
    tiny_model_dir: Callable[..., Path], tokenizer: Any
) -> None:
    engine = EmbeddedEngine(tiny_model_dir(vocab=16), tokenizer, batch_size=64)
    other_dir = tiny_model_dir(vocab=16, seed=5)
    engine.sample_from(InternalLayerPolicy(2))
    engine.load_weights(load_file(other_dir / "model.safetensors").items(), version=1)
    internal = engine.generate(PROMPTS, SAMPLING)
    assert farthest_from_dense(dense_model(other_dir), internal, InternalLayerPolicy(2)) < 1e-5
    engine.sample_from(FULL)
    fresh = EmbeddedEngine(other_dir, tokenizer, batch_size=64)
    assert said(engine.generate(PROMPTS, SAMPLING)) == said(fresh.generate(PROMPTS, SAMPLING))


@pytest.mark.parametrize("layer", [0, LAYERS, LAYERS + 1])
def test_only_layers_below_the_last_are_internal(
    tiny_model_dir: Callable[..., Path], tokenizer: Any, layer: int
) -> None:
    engine = EmbeddedEngine(tiny_model_dir(vocab=16), tokenizer, batch_size=64)
    with pytest.raises(ValueError, match=rf"internal layer {layer} of a model with 4 layers"):
        engine.sample_from(InternalLayerPolicy(layer))


def test_the_scalars_of_a_switch() -> None:
    def sent(policy: Policy) -> list[tuple[str, float]]:
        return [(name, tensor.item()) for name, tensor in switch_tensors(policy, LAYERS)]

    layer, norm = "internal_policy.layer", "internal_policy.norm"
    assert sent(FULL) == [(layer, 4), (norm, 1)]
    assert sent(InternalLayerPolicy(2)) == [(layer, 2), (norm, 0)]
    assert sent(InternalLayerPolicy(3, read_out_norm=True)) == [(layer, 3), (norm, 1)]


def test_servers_that_we_start_find_our_models_before_what_they_found_already() -> None:
    def adapted(*settings: str) -> Config:
        return serving_internal_policies(
            load_config(None, ["model.path=x", "data.train=x", *settings])
        )

    config = adapted("servers.env.PYTHONPATH=/theirs", "sglang.tp_size=2")
    first, *rest = config.servers.env["PYTHONPATH"].split(":")
    assert (Path(first) / "bupo_sglang_models" / "__init__.py").is_file()
    assert rest == ["/theirs"]
    assert config.sglang == {"tp_size": 2, "disable_cuda_graph": True}
    others = adapted("servers.addresses=[http://other:30000]")
    assert (others.servers.env, others.sglang) == ({}, {})


def test_a_server_without_our_models_has_the_full_policy_alone(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    async def asked(url: str, policy: Policy) -> bool:
        client = ServerClient(url)
        try:
            assert not await is_switchable(client)
            return await samples_from(client, policy, LAYERS)
        finally:
            await client.close()

    with fake_server(tiny_model_dir(vocab=16), tmp_path / "log") as fake:
        assert asyncio.run(asked(fake.url, FULL))
        with pytest.raises(InputError, match="cannot sample from internal policies; start it with"):
            asyncio.run(asked(fake.url, InternalLayerPolicy(2)))
