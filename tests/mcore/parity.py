"""The parity matrix: models under layouts, each against transformers on one process.

A case runs every policy of its model. In fp32 the numbers must agree to rounding; in bf16 the
layouts may stray from exact arithmetic as far as transformers' own bf16 does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from tests.dense import DenseUpdate, by_hf_name, dense_logprobs, dense_model, dense_update
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
from tests.tiny_models import LLAMA3_ROPE

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import TokenBatch

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
MOE = _COMMON | {"family": "qwen3_moe", "head_dim": 12, "num_experts": 6}
SPARSE = {"mlp_only_layers": [1, 3], "norm_topk_prob": False}
TIED = {"tied": True}
DIST: dict[str, Any] = {"distributed_optimizer": True}
BF16 = "bfloat16"
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Case:
    """A model under a layout."""

    name: str
    model: dict[str, Any]
    ranks: int
    layout: dict[str, Any]
    megatron: dict[str, Any]
    dtype: str
    fast: bool  # is it in the fast tier?


def _case(
    name: str,
    model: dict[str, Any],
    /,
    ranks: int = 1,
    *,
    megatron: dict[str, Any] | None = None,
    dtype: str = "float32",
    fast: bool = False,
    **layout: Any,
) -> Case:
    return Case(name, model, ranks, layout, megatron or {}, dtype, fast)


CASES = [
    _case("one rank, qwen3", QWEN3, fast=True),
    _case("TP2, llama", LLAMA, 2, tp=2, fast=True),
    _case("PP2, qwen2 tied", QWEN2 | TIED, 2, pp=2, fast=True),
    _case("TP2 PP2 SP, qwen3 tied", QWEN3 | TIED, 4, tp=2, pp=2, sp=True, fast=True),
    _case("VPP2 PP2, qwen3", QWEN3, 2, pp=2, vpp=2, fast=True),
    _case("DP2 distributed optimizer, qwen2", QWEN2, 2, dp=2, **DIST, fast=True),
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
    _case("TP2 DP2 distributed optimizer, qwen3", QWEN3, 4, tp=2, dp=2, **DIST),
    _case(
        "PP2 DP2 distributed optimizer, qwen2 tied",
        QWEN2 | TIED,
        4,
        pp=2,
        dp=2,
        **DIST,
    ),
    _case("CP2, qwen3", QWEN3, 2, cp=2, fast=True),
    _case("CP2 TP2 SP, qwen2 tied", QWEN2 | TIED, 4, cp=2, tp=2, sp=True),
    _case("CP2 PP2, llama", LLAMA, 4, cp=2, pp=2),
    _case("CP4, qwen3 tied", QWEN3 | TIED, 4, cp=4),
    _case("CP2 DP2 distributed optimizer, qwen3", QWEN3, 4, cp=2, dp=2, **DIST),
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
    _case(
        "TP2 PP2 DP2 distributed optimizer, qwen3 tied", QWEN3 | TIED, 8, tp=2, pp=2, dp=2, **DIST
    ),
    _case("TP2 PP2 CP2 SP, llama", LLAMA, 8, tp=2, pp=2, cp=2, sp=True),
    _case("PP4 DP2, qwen2", QWEN2, 8, pp=4, dp=2),
    _case(
        "PP2 VPP2 CP2 DP2 distributed optimizer, qwen3 tied",
        QWEN3 | TIED,
        8,
        pp=2,
        vpp=2,
        cp=2,
        dp=2,
        **DIST,
    ),
    _case(
        "core attention recomputed, TP2 CP2 SP, qwen3",
        QWEN3,
        4,
        tp=2,
        cp=2,
        sp=True,
        megatron=SELECTIVE,
    ),
    _case("one rank, qwen3_moe", MOE, fast=True),
    _case("EP2, qwen3_moe", MOE, 2, dp=2, ep=2, fast=True),
    _case("TP2 EP2 SP, qwen3_moe", MOE, 4, tp=2, dp=2, ep=2, sp=True),
    _case(
        "TP2 EP2 ETP1 SP, qwen3_moe tied, some layers dense",
        MOE | TIED | SPARSE,
        4,
        tp=2,
        dp=2,
        ep=2,
        etp=1,
        sp=True,
    ),
    _case("PP2 EP2 distributed optimizer, qwen3_moe", MOE, 4, pp=2, dp=2, ep=2, **DIST),
    _case(
        "DP4 EP2 distributed optimizer, overlapped, qwen3_moe",
        MOE,
        4,
        dp=4,
        ep=2,
        megatron={"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1},
        **DIST,
    ),
    _case("TP2 ETP1 SP, qwen3_moe", MOE, 2, tp=2, etp=1, sp=True),
    _case("PP2 VPP2 EP3, qwen3_moe", MOE, 6, pp=2, vpp=2, dp=3, ep=3),
    _case("recompute, CP2 EP2, qwen3_moe", MOE, 2, cp=2, ep=2, megatron=RECOMPUTE),
    _case("bf16, EP2, qwen3_moe", MOE, 2, dp=2, ep=2, dtype=BF16),
    _case("bf16, one rank, qwen3 tied", QWEN3 | TIED, dtype=BF16, fast=True),
    _case("bf16, TP2 PP2 SP, llama", LLAMA, 4, tp=2, pp=2, sp=True, dtype=BF16),
    _case(
        "bf16, PP2 DP2 distributed optimizer, qwen2 tied",
        QWEN2 | TIED,
        4,
        pp=2,
        dp=2,
        dtype=BF16,
        **DIST,
    ),
    _case("bf16, CP2, qwen3", QWEN3, 2, cp=2, dtype=BF16),
]


@dataclass
class Gaps:
    """The largest deviations over some policies on one layout; what transformers' own bf16
    deviates by, where that is the measure.
    """

    logprobs: float = 0.0  # nats
    entropies: float = 0.0  # nats
    loss: float = 0.0
    grad_norm: float = 0.0  # relative
    grads: float = 0.0

    def widen(self, **seen: float) -> None:
        """Take over what is larger."""
        for name, value in seen.items():
            setattr(self, name, max(getattr(self, name), value))

    def over(self, other: Gaps, *names: str) -> float:
        """The largest of the deviations named (none: of all) over those of `other`."""
        return max(getattr(self, n) / getattr(other, n) for n in names or vars(self))


@dataclass
class Reference:
    """What a case is held to."""

    batch: TokenBatch
    updates: dict[Policy, DenseUpdate]
    allowed: Gaps
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


EXACT = Gaps(logprobs=1e-5, entropies=1e-5, loss=1e-6, grad_norm=1e-5, grads=1e-6)


def policies(layers: int) -> list[Policy]:
    """The full policy, and every internal one with and without the final norm."""
    internal = [InternalLayerPolicy(n, norm) for n in range(1, layers) for norm in (False, True)]
    return [FULL, *internal]


def reference(case: Case, model_dir: Path) -> Reference:
    """The dense model's numbers; of a bf16 case in fp32, on weights rounded to bf16."""
    dtype = getattr(torch, case.dtype)
    model = dense_model(model_dir, dtype).float()
    weights = by_hf_name((name, p.detach().to(dtype)) for name, p in model.named_parameters())
    batch, updates, allowed = random_batch(vocab=case.model["vocab"]), {}, EXACT
    for policy in policies(case.model.get("layers", 4)):
        logprobs, _ = dense_logprobs(model, batch, policy)
        stale = with_stale_logprobs(batch, logprobs.detach())
        updates[policy] = dense_update(model, stale, policy)
    if dtype != torch.float32:
        rounded, allowed = dense_model(model_dir, dtype), Gaps()
        for policy, exact in updates.items():
            stale = with_stale_logprobs(batch, exact.logprobs)
            theirs = dense_update(rounded, stale, policy)
            allowed.widen(**deviations(theirs, exact))
    return Reference(batch, updates, allowed, weights)


def deviations(ours: DenseUpdate, exact: DenseUpdate) -> dict[str, float]:
    """How far one update is from another, as the fields of `Gaps`."""
    assert ours.grads.keys() == exact.grads.keys()
    return {
        "logprobs": _gap(ours.logprobs, exact.logprobs),
        "entropies": _gap(ours.entropies, exact.entropies),
        "loss": abs(ours.loss - exact.loss),
        "grad_norm": abs(ours.grad_norm / exact.grad_norm - 1),
        "grads": max(_gap(grad, exact.grads[name]) for name, grad in ours.grads.items()),
    }


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max())


def measure(case: Case, model_dir: Path, expected: Reference) -> dict[str, Any]:
    """On each rank: everything that the layout can show."""
    config = run_config(parallel=case.layout, megatron=case.megatron, model={"dtype": case.dtype})
    trainer = start_trainer(model_dir, config)
    weights = snapshot(trainer)
    gaps = {"full": Gaps(), "internal": Gaps()}
    for policy, exact in expected.updates.items():
        logprobs, entropies = trainer.logprobs(expected.batch, policy)
        stale = with_stale_logprobs(expected.batch, exact.logprobs)
        metrics = trainer.update(stale, policy, lr=0.0).metrics
        loss, norm = metrics["update/loss"], metrics["update/grad_norm"]
        grads = full_gradients(trainer)
        ours = DenseUpdate(logprobs, entropies, loss, norm, grads)
        gaps["full" if policy == FULL else "internal"].widen(**deviations(ours, exact))
        unreached = [name for name, grad in exact.grads.items() if not grad.any()]
        assert not any(grads[name].any() for name in unreached), policy
    internal = InternalLayerPolicy(2)
    train_once(trainer, expected.batch, internal, lr=1e-2)
    after = snapshot(trainer)
    return {
        "gaps": gaps,
        "replica gap": replica_gap(trainer),
        "weights": weights,
        "moved": {name for name in weights if not torch.equal(weights[name], after[name])},
        "sent": {
            name: tensor.to("cpu", copy=True) for name, tensor in trainer.changed_weights(internal)
        },
        "after": after,
    }
