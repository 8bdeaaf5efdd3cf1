"""The parity matrix: models under layouts, each against transformers on one process.

A case runs every policy of its model, each with another advantage and loss, and with HICRA on top.
In fp32 the numbers must agree to rounding; in bf16 the layouts may stray from exact arithmetic as
far as transformers' own bf16 does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.schema import AlgorithmConfig, RolloutConfig
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
from tests.mcore.credited import LONGEST, algorithm, credited
from tests.mcore.parity_cases import CASES

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
    loss: float = 0.0  # relative where it is above 1
    grad_norm: float = 0.0  # relative
    grads: float = 0.0  # relative to the largest of all where that is above 1

    def widen(self, **seen: float) -> None:
        """Take over what is larger."""
        for name, value in seen.items():
            setattr(self, name, max(getattr(self, name), value))

    def over(self, other: Gaps, *names: str) -> float:
        """The largest of the deviations named (none: of all) over those of `other`."""
        return max(getattr(self, n) / getattr(other, n) for n in names or vars(self))


@dataclass
class Step:
    """What a policy learns from, and the update that it should come to."""

    algorithm: AlgorithmConfig
    batch: TokenBatch
    exact: DenseUpdate


@dataclass
class Reference:
    """What a case is held to."""

    steps: dict[Policy, Step]
    allowed: Gaps
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


EXACT = Gaps(logprobs=1e-5, entropies=1e-5, loss=1e-6, grad_norm=2e-6, grads=1e-6)


def policies(layers: int) -> list[Policy]:
    """The full policy, and every internal one with and without the final norm."""
    internal = [InternalLayerPolicy(n, norm) for n in range(1, layers) for norm in (False, True)]
    return [FULL, *internal]


def algorithms(case: Case) -> dict[Policy, AlgorithmConfig]:
    """What trains each policy of `case`; the cases together go through all that there is."""
    every = policies(case.model.get("layers", 4))
    first = CASES.index(case) * 17  # any number will do with which all pairs meet all layouts
    return {policy: algorithm(first + place) for place, policy in enumerate(every)}


def reference(case: Case, model_dir: Path) -> Reference:
    """The dense model's numbers; of a bf16 case in fp32, on weights rounded to bf16."""
    dtype = getattr(torch, case.dtype)
    model = dense_model(model_dir, dtype).float()
    weights = by_hf_name((name, p.detach().to(dtype)) for name, p in model.named_parameters())
    batch, steps, allowed = random_batch(vocab=case.model["vocab"]), {}, EXACT
    for policy, by in algorithms(case).items():
        logprobs, _ = dense_logprobs(model, batch, policy)
        # Rounding grows with a ratio that nothing clips
        leap = 0.0 if by.loss == "unclipped" else 3.0
        stale = credited(with_stale_logprobs(batch, logprobs.detach(), leap=leap), by)
        steps[policy] = Step(by, stale, _dense(model, stale, policy, by))
    if dtype != torch.float32:
        rounded, allowed = dense_model(model_dir, dtype), Gaps()
        for policy, step in steps.items():
            theirs = _dense(rounded, step.batch, policy, step.algorithm)
            allowed.widen(**deviations(theirs, step.exact))
    return Reference(steps, allowed, weights)


def _dense(model: Any, batch: TokenBatch, policy: Policy, by: AlgorithmConfig) -> DenseUpdate:
    knobs = {"kind": by.loss, "aggregation": by.aggregation, "longest": LONGEST}
    return dense_update(model, batch, policy, **knobs)


def deviations(ours: DenseUpdate, exact: DenseUpdate) -> dict[str, float]:
    """How far one update is from another, as the fields of `Gaps`."""
    assert ours.grads.keys() == exact.grads.keys()
    largest = max(1.0, *(float(grad.abs().max()) for grad in exact.grads.values()))
    return {
        "logprobs": _gap(ours.logprobs, exact.logprobs),
        "entropies": _gap(ours.entropies, exact.entropies),
        "loss": abs(ours.loss - exact.loss) / max(1.0, abs(exact.loss)),
        "grad_norm": abs(ours.grad_norm / exact.grad_norm - 1),
        "grads": max(_gap(grad, exact.grads[name]) for name, grad in ours.grads.items()) / largest,
    }


def _gap(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return float((ours.float() - theirs.float()).abs().max())


def measure(case: Case, model_dir: Path, expected: Reference) -> dict[str, Any]:
    """On each rank: everything that the layout can show."""
    config = run_config(parallel=case.layout, megatron=case.megatron, model={"dtype": case.dtype})
    rollout = RolloutConfig(max_response_tokens=LONGEST)
    trainer = start_trainer(model_dir, config)
    weights = snapshot(trainer)
    gaps = {"full": Gaps(), "internal": Gaps()}
    for policy, step in expected.steps.items():
        trainer.config = replace(config, algorithm=step.algorithm, rollout=rollout)
        logprobs, entropies = trainer.logprobs(step.batch, policy)
        metrics = trainer.update(step.batch, policy, lr=0.0).metrics
        loss, norm = metrics["update/loss"], metrics["update/grad_norm"]
        grads = full_gradients(trainer)
        ours = DenseUpdate(logprobs, entropies, loss, norm, grads)
        gaps["full" if policy == FULL else "internal"].widen(**deviations(ours, step.exact))
        unreached = [name for name, grad in step.exact.grads.items() if not grad.any()]
        assert not any(grads[name].any() for name in unreached), policy
    internal = InternalLayerPolicy(2)
    step = expected.steps[internal]
    batch = credited(step.batch, step.algorithm)
    assert _gap(batch.advantages, step.batch.advantages) == 0
    train_once(trainer, batch, internal, lr=1e-2)
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
