"""The reference is the model as training found it, and to ask it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    another_trainer,
    full_gradients,
    random_batch,
    run_config,
    snapshot,
    start_trainer,
    train_once,
    with_stale_logprobs,
)
from tests.ranks import run_ranks
from tests.tiers import cases

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config.schema import Config
    from megatron_bupo.mcore.trainer import MegatronTrainer
    from megatron_bupo.types import TokenBatch

pytestmark = pytest.mark.slow

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
INTERNAL = InternalLayerPolicy(2)
COEFFICIENT, LR = 0.3, 1e-2

# Between them they meet every optimizer of Megatron's, and views of its buffers.
DISTRIBUTED = {"dp": 2, "distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RUNS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one rank, bfloat16": (1, {"model": {"dtype": "bfloat16"}}, False),
    "TP2 PP2, tied": (4, {"parallel": {"tp": 2, "pp": 2}}, True),
    "distributed optimizer": (2, {"parallel": DISTRIBUTED}, False),
    "distributed optimizer, overlapped, bfloat16": (
        2,
        {"parallel": DISTRIBUTED, "megatron": OVERLAP, "model": {"dtype": "bfloat16"}},
        True,
    ),
}


def _with_reference(**sections: Any) -> Config:
    algorithm = {"kl_coefficient": COEFFICIENT, **sections.pop("algorithm", {})}
    return run_config(algorithm=algorithm, **sections)


def _held(trainer: MegatronTrainer) -> list[Tensor]:
    """All that this rank keeps of the model: parameters, what the optimizer steps, its moments."""
    tensors: list[Tensor] = list(trainer._unit_of)
    whole: Any = trainer.optimizer.megatron
    for part in getattr(whole, "chained_optimizers", [whole]):
        for p in [p for group in part.optimizer.param_groups for p in group["params"]]:
            state = part.optimizer.state[p]
            tensors += [p, state["exp_avg"], state["exp_avg_sq"]]
    return [tensor.detach() for tensor in tensors]


def _asked(model_dir: Path, config: Config, batch: TokenBatch) -> dict[str, Any]:
    """Two updates of each policy, with the reference asked in between, and without."""
    trainer = start_trainer(model_dir, config)
    fresh = {policy: trainer.logprobs(batch, policy)[0] for policy in (FULL, INTERNAL)}
    gaps, moved, changed = [], [], []
    for policy in (INTERNAL, FULL, INTERNAL, FULL):
        train_once(trainer, batch, policy, LR)
        before: list[tuple[int, Tensor]] = []
        for asked in (INTERNAL, FULL, INTERNAL):
            reference = trainer.ref_logprobs(batch, asked, temperature=1.0)
            gaps.append(float((reference - fresh[asked]).abs().max()))
            # From here on: what overlaps with the passes has come to its end with the first.
            before = before or [(t.data_ptr(), t.clone()) for t in _held(trainer)]
        after = _held(trainer)
        moved += [t.data_ptr() != place for t, (place, _) in zip(after, before, strict=True)]
        changed += [not torch.equal(t, was) for t, (_, was) in zip(after, before, strict=True)]
    other = another_trainer(model_dir, config)
    for policy in (INTERNAL, FULL, INTERNAL, FULL):
        train_once(other, batch, policy, LR)
    ends, others = snapshot(trainer), snapshot(other)
    return {
        "gaps": gaps,
        "moved": any(moved),
        "changed": any(changed),
        "differ": [name for name in ends if not torch.equal(ends[name], others[name])],
        "trained": float((trainer.logprobs(batch, FULL)[0] - fresh[FULL]).abs().max()),
    }


@pytest.mark.parametrize(
    ("ranks", "settings", "tied"),
    cases(RUNS, slow={"TP2 PP2, tied", "distributed optimizer, overlapped, bfloat16"}),
)
def test_the_reference_stays_the_first_model_and_asking_it_leaves_no_trace(
    ranks: int, settings: dict[str, Any], tied: bool, tiny_model_dir: Callable[..., Path]
):
    model_dir, config = tiny_model_dir(**MODEL, tied=tied), _with_reference(**settings)
    for seen in run_ranks(ranks, _asked, model_dir, config, random_batch()):
        assert seen["gaps"] == [0.0] * 12
        assert not seen["moved"]
        assert not seen["changed"]
        assert seen["differ"] == []
        assert seen["trained"] > 0.05


def _fails(model_dir: Path, config: Config, batch: TokenBatch) -> list[bool]:
    trainer = start_trainer(model_dir, config)
    train_once(trainer, batch, FULL, LR)
    before = snapshot(trainer)
    too_long = replace(batch, input_ids=batch.input_ids + 1000)  # ids without an embedding
    with pytest.raises(IndexError):
        trainer.ref_logprobs(too_long, FULL, temperature=1.0)
    return [torch.equal(before[name], tensor) for name, tensor in snapshot(trainer).items()]


def test_a_pass_that_fails_leaves_the_training_weights_in_place(
    tiny_model_dir: Callable[..., Path],
):
    [same] = run_ranks(1, _fails, tiny_model_dir(**MODEL), _with_reference(), random_batch())
    assert all(same)


def _dense_kl(model: Any, batch: TokenBatch, policy: Policy, estimator: str) -> dict[str, Any]:
    """Loss, mean KL and gradients of `dense_update` with the KL added, token by token."""
    policy_alone = dense_update(model, batch, policy)
    model.zero_grad()
    logprobs, _ = dense_logprobs(model, batch, policy)
    assert batch.ref_logprobs is not None
    terms = []
    for i, t in batch.response_mask.nonzero().tolist():
        r = torch.exp(batch.ref_logprobs[i, t] - logprobs[i, t])
        terms.append({"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}[estimator])
    kl = torch.stack(terms).mean()
    (COEFFICIENT * kl).backward()
    zero = torch.zeros(())
    return {
        "loss": policy_alone.loss + COEFFICIENT * kl.item(),
        "kl": kl.item(),
        "grads": {
            name: policy_alone.grads[name] + (zero if p.grad is None else p.grad)
            for name, p in model.named_parameters()
        },
        "without": policy_alone,
    }


def _kl_updates(
    model_dir: Path, config: Config, batch: TokenBatch, policy: Policy
) -> dict[tuple[str, str], tuple[dict[str, float], dict[str, Tensor]]]:
    trainer = start_trainer(model_dir, config)
    answers = {}
    for estimator in ("k1", "k2", "k3"):
        for place in ("loss", "reward"):
            algorithm = replace(config.algorithm, kl_estimator=estimator, kl_in=place)
            trainer.config = replace(config, algorithm=algorithm)
            metrics = dict(trainer.update(batch, policy, lr=0.0).metrics)
            answers[estimator, place] = metrics, full_gradients(trainer)
    return answers


@pytest.mark.parametrize(
    ("ranks", "layout", "policy"),
    [
        (1, {}, FULL),
        (1, {}, INTERNAL),
        pytest.param(4, {"tp": 2, "pp": 2, "sp": True}, INTERNAL, marks=pytest.mark.slow),
        (2, {"dp": 2, "distributed_optimizer": True}, FULL),
    ],
    ids=str,
)
def test_the_kl_and_its_gradient_equal_dense_autograd(
    ranks: int, layout: dict[str, Any], policy: Policy, tiny_model_dir: Callable[..., Path]
):
    model_dir, batch = tiny_model_dir(**MODEL), random_batch()
    model = dense_model(model_dir)
    with torch.no_grad():
        logprobs, _ = dense_logprobs(model, batch, policy)
    ref = with_stale_logprobs(batch, logprobs * 1.1).old_logprobs
    assert ref is not None
    batch = with_stale_logprobs(batch, logprobs).with_ref_logprobs(ref)
    config = _with_reference(parallel=layout)
    for answers in run_ranks(ranks, _kl_updates, model_dir, config, batch, policy):
        for (estimator, place), (metrics, grads) in answers.items():
            dense = _dense_kl(model, batch, policy, estimator)
            in_loss = place == "loss"
            loss = dense["loss"] if in_loss else dense["without"].loss
            expected = dense["grads"] if in_loss else dense["without"].grads
            assert metrics["update/loss"] == pytest.approx(loss, abs=2e-6)
            assert metrics["update/kl_to_reference_nats"] == pytest.approx(dense["kl"], abs=1e-5)
            assert max(float((grads[n] - expected[n]).abs().max()) for n in expected) < 2e-6


def _without(model_dir: Path, config: Config, batch: TokenBatch) -> tuple[bool, set[str]]:
    trainer = start_trainer(model_dir, config)
    return trainer.reference is None, set(train_once(trainer, batch, FULL, LR).metrics)


def test_without_a_coefficient_no_reference_is_held_or_reported(
    tiny_model_dir: Callable[..., Path],
):
    model_dir = tiny_model_dir(**MODEL)
    [(absent, metrics)] = run_ranks(1, _without, model_dir, run_config(), random_batch())
    assert absent
    [(present, more)] = run_ranks(1, _without, model_dir, _with_reference(), random_batch())
    assert not present
    assert more - metrics == {"update/kl_to_reference_nats"}
