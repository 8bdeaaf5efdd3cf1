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

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import TokenBatch
    from tests.mcore.parity_cases import Case


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
