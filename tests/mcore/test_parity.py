"""The actor under every layout against transformers on one process, for every policy.

One fork per layout shows all that the layout can show: weights go in and come out bit-equal;
log-probs, entropies, loss, gradient norm and every gradient equal the reference's; a real update
moves what the policy trains and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    full_gradients,
    random_batch,
    replica_gap,
    run_config,
    snapshot,
    start_trainer,
    train_once,
    with_stale_logprobs,
)
from tests.ranks import run_ranks
from tests.tiny_models import LLAMA3_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import TokenBatch
    from tests.dense import DenseUpdate

pytestmark = pytest.mark.parity

# Weights at which log-probs lie within 8 nats and gradients near 0.2: what fp32 can be held to.
_COMMON = {"vocab": 67, "scale": 0.12}
QWEN2 = _COMMON | {"family": "qwen2"}
QWEN3 = _COMMON | {"family": "qwen3", "head_dim": 12}
LLAMA = _COMMON | {
    "family": "llama",
    "rope": LLAMA3_ROPE,  # of 8 frequencies one is kept, one blended, the others are divided
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
}
TIED = {"tied": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Case:
    """A model under a layout."""

    model: dict[str, Any]
    ranks: int = 1
    megatron: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)


def _case(name: str, model: dict[str, Any], /, ranks: int = 1, **layout: Any) -> Any:
    slow = layout.pop("slow", True)
    megatron = layout.pop("megatron", {})
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(Case(model, ranks, megatron, layout), id=name, marks=marks)


CASES = [
    _case("one rank, qwen3", QWEN3, slow=False),
    _case("TP2, llama", LLAMA, 2, tp=2, slow=False),
    _case("PP2, qwen2 tied", QWEN2 | TIED, 2, pp=2, slow=False),
    _case("TP2 PP2 SP, qwen3 tied", QWEN3 | TIED, 4, tp=2, pp=2, sp=True, slow=False),
    _case("VPP2 PP2, qwen3", QWEN3, 2, pp=2, vpp=2, slow=False),
    _case(
        "DP2 distributed optimizer, qwen2", QWEN2, 2, dp=2, distributed_optimizer=True, slow=False
    ),
    _case("one rank, qwen2 tied", QWEN2 | TIED),
    _case("one rank, llama with all biases", LLAMA | {"bias": True}),
    _case("TP2, qwen2 tied", QWEN2 | TIED, 2, tp=2),
    _case("TP2 SP, llama with all biases", LLAMA | {"bias": True}, 2, tp=2, sp=True),
    _case("TP2 SP, qwen3 tied", QWEN3 | TIED, 2, tp=2, sp=True),
    _case("TP4, llama", LLAMA, 4, tp=4),
    _case("TP4 SP, llama", LLAMA, 4, tp=4, sp=True),
    _case("PP2, llama", LLAMA, 2, pp=2),
    _case("PP4, qwen3", QWEN3, 4, pp=4),
    _case("PP4, qwen2 tied", QWEN2 | TIED, 4, pp=4),
    _case("TP2 PP2, qwen2", QWEN2, 4, tp=2, pp=2),
    _case("TP2 PP2, llama tied, even vocabulary", LLAMA | TIED | {"vocab": 64}, 4, tp=2, pp=2),
    _case("TP2 PP2 SP, qwen2", QWEN2, 4, tp=2, pp=2, sp=True),
    _case("VPP2 PP2, qwen2 tied", QWEN2 | TIED, 2, pp=2, vpp=2),
    _case("VPP2 PP2 TP2 SP, qwen3", QWEN3, 4, tp=2, pp=2, vpp=2, sp=True),
    _case("VPP2 PP4, qwen3", QWEN3 | {"layers": 8}, 4, pp=4, vpp=2),
    _case("VPP2 PP4, llama tied", LLAMA | TIED | {"layers": 8}, 4, pp=4, vpp=2),
    _case("DP2, qwen3 tied", QWEN3 | TIED, 2, dp=2),
    _case("TP2 DP2 distributed optimizer, qwen3", QWEN3, 4, tp=2, dp=2, distributed_optimizer=True),
    _case(
        "PP2 DP2 distributed optimizer, qwen2 tied",
        QWEN2 | TIED,
        4,
        pp=2,
        dp=2,
        distributed_optimizer=True,
    ),
    _case("CP2, qwen3", QWEN3, 2, cp=2, slow=False),
    _case("CP2 TP2 SP, qwen2 tied", QWEN2 | TIED, 4, cp=2, tp=2, sp=True),
    _case("CP2 PP2, llama", LLAMA, 4, cp=2, pp=2),
    _case("CP4, qwen3 tied", QWEN3 | TIED, 4, cp=4),
    _case("CP2 DP2 distributed optimizer, qwen3", QWEN3, 4, cp=2, dp=2, distributed_optimizer=True),
    _case("CP2 PP2 VPP2 TP2 SP, qwen3", QWEN3, 8, cp=2, pp=2, vpp=2, tp=2, sp=True),
    _case("recompute, PP2, qwen3 tied", QWEN3 | TIED, 2, pp=2, megatron=RECOMPUTE),
    _case(
        "recompute, TP2 PP2 SP, outputs freed, llama",
        LLAMA,
        4,
        tp=2,
        pp=2,
        sp=True,
        megatron=RECOMPUTE | {"deallocate_pipeline_outputs": True},
    ),
    _case(
        "1 + 3 layers, PP2, qwen3",
        QWEN3,
        2,
        pp=2,
        megatron={"num_layers_in_first_pipeline_stage": 1},
    ),
    _case(
        "1 + 2 + 1 layers, PP3, qwen2 tied",
        QWEN2 | TIED,
        3,
        pp=3,
        megatron={"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
    ),
]


def _policies(layers: int) -> list[Policy]:
    internal = [InternalLayerPolicy(n, norm) for n in range(1, layers) for norm in (False, True)]
    return [FULL, *internal]


@dataclass
class Seen:
    """The largest deviations over all policies on one layout."""

    logprobs: float = 0.0
    entropies: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0  # relative
    grads: float = 0.0
    replicas: float = 0.0


def _measure(
    case: Case, model_dir: Path, batch: TokenBatch, expected: dict[Policy, DenseUpdate]
) -> dict[str, Any]:
    """On each rank: everything that the layout can show."""
    config = run_config(parallel=case.layout, megatron=case.megatron)
    trainer = start_trainer(model_dir, config)
    weights = snapshot(trainer)
    worst = Seen()
    for policy, dense in expected.items():
        logprobs, entropies = trainer.logprobs(batch, policy)
        stale = with_stale_logprobs(batch, dense.logprobs)
        metrics = trainer.update(stale, policy, lr=0.0).metrics
        grads = full_gradients(trainer)
        assert grads.keys() == dense.grads.keys() == weights.keys()
        for name, seen in {
            "logprobs": _gap(logprobs, dense.logprobs),
            "entropies": _gap(entropies, dense.entropies),
            "loss": abs(metrics["update/loss"] - dense.loss),
            "grad_norm": abs(metrics["update/grad_norm"] / dense.grad_norm - 1),
            "grads": max(_gap(grads[name], dense.grads[name]) for name in grads),
        }.items():
            setattr(worst, name, max(getattr(worst, name), seen))
        unreached = [name for name, grad in dense.grads.items() if not grad.any()]
        assert not any(grads[name].any() for name in unreached), policy
    internal = InternalLayerPolicy(2)
    train_once(trainer, batch, internal, lr=1e-2)
    after = snapshot(trainer)
    worst.replicas = replica_gap(trainer)
    return {
        "worst": worst,
        "weights": weights,
        "moved": {name for name in weights if not torch.equal(weights[name], after[name])},
        "sent": {name: tensor.clone() for name, tensor in trainer.changed_weights(internal)},
        "after": after,
    }


def _gap(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_every_policy_equals_the_dense_reference(case: Case, tiny_model_dir: Callable[..., Path]):
    model_dir = tiny_model_dir(**case.model)
    model, batch = dense_model(model_dir), random_batch(vocab=case.model["vocab"])
    expected = {}
    for policy in _policies(case.model.get("layers", 4)):
        logprobs, _ = dense_logprobs(model, batch, policy)
        expected[policy] = dense_update(
            model, with_stale_logprobs(batch, logprobs.detach()), policy
        )
        assert max(float(grad.abs().max()) for grad in expected[policy].grads.values()) > 0.03
    for seen in run_ranks(case.ranks, _measure, case, model_dir, batch, expected):
        worst = seen["worst"]
        stored = load_file(model_dir / "model.safetensors")
        assert seen["weights"].keys() == stored.keys()
        assert all(torch.equal(seen["weights"][name], stored[name]) for name in stored)
        assert worst.logprobs < 1e-5
        assert worst.entropies < 1e-5
        assert worst.loss < 1e-6
        assert worst.grad_norm < 1e-5
        assert worst.grads < 1e-6
        assert worst.replicas == 0
        above = {n for n in stored if n == "model.norm.weight" or _layer_of(n) > 2}
        assert seen["moved"] == set(stored) - above == set(seen["sent"])
        assert all(torch.equal(seen["after"][n], sent) for n, sent in seen["sent"].items())


def _layer_of(name: str) -> int:
    """The layer that an HF tensor belongs to, counted from 1; 0 outside the layers."""
    return int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
