"""PPO's critic under every layout against transformers' reward model on one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_bupo.algorithm.value import explained_variance
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.schema import CriticConfig, OptimizerConfig
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.critic import MegatronCritic, build_critic
from tests.dense import by_hf_name
from tests.mcore.actors import full_gradients, random_batch, replica_gap, run_config, snapshot
from tests.mcore.parity_cases import DIST, LLAMA, MOE, OVERLAP, QWEN2, QWEN3, RECOMPUTE, TIED
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from megatron_bupo.types import TokenBatch

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    "one rank, qwen2 tied": (QWEN2 | TIED, 1, {}, {}),
    "TP2, llama": (LLAMA, 2, {"tp": 2}, {}),
    "PP2, qwen2 tied": (QWEN2 | TIED, 2, {"pp": 2}, {}),
    "TP2 PP2 SP, qwen3 tied": (QWEN3 | TIED, 4, {"tp": 2, "pp": 2, "sp": True}, {}),
    "VPP2 PP2 recomputed, qwen3": (QWEN3, 2, {"pp": 2, "vpp": 2}, RECOMPUTE),
    "CP2, qwen3": (QWEN3, 2, {"cp": 2}, {}),
    "DP2 distributed optimizer, overlapped, qwen2": (QWEN2, 2, {"dp": 2, **DIST}, OVERLAP),
    "TP2 EP2 SP, qwen3_moe": (MOE, 4, {"tp": 2, "dp": 2, "ep": 2, "sp": True}, {}),
    "1 + 3 layers, PP2, qwen3": (
        QWEN3,
        2,
        {"pp": 2},
        {"num_layers_in_first_pipeline_stage": 1},
    ),
}


def reward_model(model_dir: Path, to: Path) -> Any:
    """The tiny language model at `model_dir` as transformers' reward model, saved `to`."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        model.score.weight.copy_(0.05 * torch.randn(model.score.weight.shape))
    model.save_pretrained(to)
    return model


def dense_values(model: Any, batch: TokenBatch) -> Tensor:
    """`[responses, tokens]`: at a response token, what the model says of those before it."""
    values = model.score(model.model(batch.input_ids).last_hidden_state).squeeze(-1)
    return torch.cat((torch.zeros(len(batch), 1), values[:, :-1]), dim=1) * batch.response_mask


def loop_value_loss(values: Tensor, batch: TokenBatch, clip_range: float) -> tuple[Tensor, float]:
    """The loss, one token at a time, and the fraction of tokens that the clip stops."""
    assert batch.values is not None
    assert batch.returns is not None
    losses, clipped = [], 0
    for i, t in batch.response_mask.nonzero().tolist():
        old, target, value = batch.values[i, t], batch.returns[i, t], values[i, t]
        near = torch.minimum(torch.maximum(value, old - clip_range), old + clip_range)
        free, bounded = (value - target) ** 2, (near - target) ** 2
        clipped += int(bounded > free)
        losses.append(torch.maximum(free, bounded) / 2)
    return torch.stack(losses).sum() / len(losses), clipped / len(losses)


def batch_to_learn_from(values: Tensor) -> TokenBatch:
    """Values that have drifted, some out of the clip range, and returns beside them."""
    batch = random_batch()
    drift, noise = torch.randn(2, *values.shape, generator=torch.Generator().manual_seed(3))
    mask = batch.response_mask
    return batch.with_values((values + 0.5 * drift) * mask).with_returns((values + noise) * mask)


def start_critic(model_dir: Path, **sections: Any) -> MegatronCritic:
    """The critic that begins with `model_dir`, in a worker without groups yet."""
    config = run_config(**{"model": {"path": str(model_dir)}, **sections})
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    return build_critic(read_architecture(model_dir, value_head=True), config)


def measure(model_dir: Path, batch: TokenBatch, sections: dict[str, Any]) -> dict[str, Any]:
    """On each rank: everything that the layout can show."""
    critic = start_critic(model_dir, **sections)
    weights, values = snapshot(critic), critic.values(batch)
    metrics = critic.update(batch, lr=0.0).metrics
    seen = {"weights": weights, "values": values, "metrics": metrics}
    seen |= {"grads": full_gradients(critic), "replica gap": replica_gap(critic)}
    critic.update(batch, lr=1e-2)
    moved = snapshot(critic)
    return seen | {"still": [n for n in moved if torch.equal(moved[n], weights[n])]}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_dense_reference(
    case: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model, ranks, layout, megatron = CASES[case]
    dense = reward_model(tiny_model_dir(**model), tmp_path)
    values = dense_values(dense, random_batch())
    batch = batch_to_learn_from(values.detach())
    loss, clipped = loop_value_loss(values, batch, 0.4)
    loss.backward()
    weights = by_hf_name((n, p.detach()) for n, p in dense.named_parameters())
    grads = by_hf_name((n, p.grad) for n, p in dense.named_parameters())
    norm = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
    assert 0.1 < clipped < 0.9
    critic = CriticConfig(clip_range=0.4, optimizer=OptimizerConfig(clip_grad=1e9))
    sections = {"parallel": layout, "megatron": megatron, "critic": critic}
    for seen in run_ranks(ranks, measure, tmp_path, batch, sections):
        assert (seen["values"] - values).abs().max() < 1e-5
        assert seen["metrics"]["critic/value_loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert seen["metrics"]["critic/clipped_fraction"] == pytest.approx(clipped)
        assert seen["metrics"]["critic/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert seen["grads"].keys() == grads.keys() == seen["weights"].keys()
        assert max((seen["grads"][n] - grads[n]).abs().max() for n in grads) < 1e-6
        assert all(torch.equal(seen["weights"][n], weights[n]) for n in weights)
        assert seen["replica gap"] == 0
        assert seen["still"] == []


def learn_by_heart(model_dir: Path, batch: TokenBatch) -> dict[str, Any]:
    optimizer = OptimizerConfig(lr_factors={"embedding": 0.0, "1": 0.0})
    critic = start_critic(model_dir, critic=CriticConfig(optimizer=optimizer))
    before, first = snapshot(critic), critic.values(batch)
    assert batch.returns is not None
    foreseen = []
    for _ in range(60):
        now = batch.with_values(critic.values(batch))
        foreseen.append(
            explained_variance(critic.values(batch), batch.returns, batch.learning_mask)
        )
        critic.update(now, lr=3e-3)
    after = snapshot(critic)
    return {
        "first": first,
        "foreseen": foreseen,
        "still": {name for name in before if torch.equal(before[name], after[name])},
        "parameters": sum(p.numel() for chunk in critic.gpt_chunks for p in chunk.parameters()),
    }


def test_a_critic_begins_with_a_head_of_zeros_and_learns_what_is_to_be_learned(
    tiny_model_dir: Callable[..., Path],
):
    """Of a tied language model; what is frozen stays, and there is no unembedding."""
    model_dir = tiny_model_dir(**QWEN3, tied=True)
    batch = random_batch()
    batch = batch.with_returns(torch.randn(batch.input_ids.shape) * batch.response_mask)
    [seen] = run_ranks(1, learn_by_heart, model_dir, batch)
    assert not seen["first"].any()
    assert seen["foreseen"][0] == 0
    assert seen["foreseen"][-1] > 0.9
    stored = load_file(model_dir / "model.safetensors")
    assert seen["parameters"] == sum(t.numel() for t in stored.values()) + 32  # hidden
    frozen = {n for n in stored if n.startswith(("model.embed_tokens", "model.layers.0."))}
    assert seen["still"] == frozen
