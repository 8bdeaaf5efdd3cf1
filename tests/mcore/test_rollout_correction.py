"""Truncated importance sampling weighs the tokens of full-policy updates, and of no others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    another_trainer,
    random_batch,
    run_config,
    snapshot,
    start_trainer,
    with_stale_logprobs,
)
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.types import TokenBatch

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
CAP = 1.3
TIS = {"rollout_correction": "tis", "tis_cap": CAP}


@pytest.fixture
def batch(tiny_model_dir: Callable[..., Path]) -> TokenBatch:
    """Responses, one of them empty, of a sampler that is not quite the model at MODEL."""
    batch = random_batch(responses=6)
    with torch.no_grad():
        logprobs, _ = dense_logprobs(dense_model(tiny_model_dir(**MODEL)), batch, FULL)
    noise = 0.4 * torch.randn(logprobs.shape)
    return replace(batch, rollout_logprobs=(logprobs + noise) * batch.response_mask)


def _reports(
    model_dir: Path, layout: dict[str, Any], batches: list[TokenBatch]
) -> list[dict[str, float]]:
    """What an update on each batch reports, in means over tokens and over responses."""
    trainer = start_trainer(model_dir, run_config(parallel=layout, algorithm=TIS))
    config, reports = trainer.config, []
    for aggregation in ("token_mean", "sequence_mean"):
        algorithm = replace(config.algorithm, loss_aggregation=aggregation)
        trainer.config = replace(config, algorithm=algorithm)
        reports += [dict(trainer.update(batch, FULL, lr=0.0).metrics) for batch in batches]
    return reports


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        pytest.param(
            4,
            {"tp": 2, "dp": 2, "sp": True, "distributed_optimizer": True},
            marks=pytest.mark.slow,
        ),
        (4, {"pp": 2, "cp": 2}),
    ],
)
def test_the_weighted_loss_and_its_gradient_are_those_of_a_loop_over_tokens_in_any_layout(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path], batch: TokenBatch
):
    """With old log-probs of some updates ago, and with those of now, which are not passed."""
    model_dir = tiny_model_dir(**MODEL)
    model = dense_model(model_dir)
    with torch.no_grad():
        fresh = batch.with_old_logprobs(dense_logprobs(model, batch, FULL)[0])
    assert fresh.old_logprobs is not None
    stale = with_stale_logprobs(batch, fresh.old_logprobs)
    expected = []
    for aggregation in ("token_mean", "sequence_mean"):
        for known in (stale, fresh):
            assert known.old_logprobs is not None
            dense = dense_update(model, known, FULL, aggregation=aggregation, tis_cap=CAP)
            gap = (known.old_logprobs - known.rollout_logprobs)[known.response_mask].double()
            weights = gap.exp().tolist()
            expected.append(
                {
                    "update/loss": dense.loss,
                    "update/grad_norm": dense.grad_norm,
                    "update/tis_weight_mean": sum(min(w, CAP) for w in weights) / len(weights),
                    "update/tis_truncated_fraction": sum(w > CAP for w in weights) / len(weights),
                }
            )
    unweighted = dense_update(model, fresh, FULL)
    assert expected[1]["update/loss"] != pytest.approx(unweighted.loss, abs=1e-3)
    assert expected[1]["update/grad_norm"] != pytest.approx(unweighted.grad_norm, abs=1e-3)
    for reports in run_ranks(ranks, _reports, model_dir, layout, [stale, batch]):
        for report, wanted in zip(reports, expected, strict=True):
            assert {key: report[key] for key in wanted} == pytest.approx(wanted, abs=1e-6)


def _with_and_without(
    model_dir: Path, batch: TokenBatch, policy: Any
) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """An update of `policy` with the correction on, off, and left to the staleness, which is 0."""
    answers = []
    for number, mode in enumerate(("tis", "none", "auto")):
        config = run_config(algorithm=TIS | {"rollout_correction": mode})
        trainer = (another_trainer if number else start_trainer)(model_dir, config)
        answers.append((dict(trainer.update(batch, policy, lr=1e-2).metrics), snapshot(trainer)))
    return answers


@pytest.mark.parametrize("policy", [InternalLayerPolicy(2), FULL], ids=str)
def test_it_leaves_internal_steps_alone_to_the_bit_and_changes_full_ones(
    policy: Any, tiny_model_dir: Callable[..., Path], batch: TokenBatch
):
    [answers] = run_ranks(1, _with_and_without, tiny_model_dir(**MODEL), batch, policy)
    (on, weights), (off, others), auto = answers
    same = all(torch.equal(weights[name], others[name]) for name in weights)
    assert same == (policy != FULL)
    assert (on == off) == (policy != FULL)
    assert ("update/tis_weight_mean" in on) == (policy == FULL)
    assert not any(key.startswith("update/tis") for key in off)
    assert auto[0] == off
