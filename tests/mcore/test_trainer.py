"""One update means the same however it is cut up, and never holds the logits of all its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.schema import RolloutConfig
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    another_trainer,
    random_batch,
    run_config,
    snapshot,
    start_trainer,
    with_stale_logprobs,
)
from tests.mcore.test_logprobs import LargestTensor
from tests.ranks import run_ranks
from tests.tiers import cases

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.types import TokenBatch

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
INTERNAL = InternalLayerPolicy(2)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "DP2": (2, {"dp": 2}),
    "VPP2 PP2": (2, {"pp": 2, "vpp": 2}),
    "TP2 DP2 SP distributed optimizer": (
        4,
        {"tp": 2, "dp": 2, "sp": True, "distributed_optimizer": True},
    ),
}
CUTS = [
    (size, aggregation) for size in (1, 2, 4, 8) for aggregation in ("token_mean", "sequence_mean")
]


def _reports(
    model_dir: Path, layout: dict[str, Any], batches: list[TokenBatch]
) -> list[list[dict[str, float]]]:
    """For each batch, what an update reports under each of CUTS."""
    trainer = start_trainer(model_dir, run_config(parallel=layout))
    config, answers = trainer.config, []
    for batch in batches:
        reports = []
        for size, aggregation in CUTS:
            trainer.config = replace(
                config,
                trainer=replace(config.trainer, microbatch_size=size),
                algorithm=replace(config.algorithm, loss_aggregation=aggregation),
            )
            reports.append(dict(trainer.update(batch, INTERNAL, lr=0.0).metrics))
        answers.append(reports)
    return answers


@pytest.mark.parametrize(
    ("ranks", "layout"), cases(LAYOUTS, slow={"TP2 DP2 SP distributed optimizer"})
)
def test_loss_and_gradient_norm_do_not_depend_on_microbatches_or_layout(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    """Eight responses of very different lengths, and one that leaves a replica with nothing."""
    model_dir = tiny_model_dir(**MODEL)
    model, eight = dense_model(model_dir), random_batch(responses=8)
    with torch.no_grad():
        eight = with_stale_logprobs(eight, dense_logprobs(model, eight, INTERNAL)[0])
    batches = [eight, eight.rows(slice(0, 1))]
    for answers in run_ranks(ranks, _reports, model_dir, layout, batches):
        for batch, reports in zip(batches, answers, strict=True):
            losses = set()
            for (_, aggregation), report in zip(CUTS, reports, strict=True):
                dense = dense_update(model, batch, INTERNAL, aggregation=aggregation)
                assert report["update/loss"] == pytest.approx(dense.loss, abs=1e-6)
                assert report["update/grad_norm"] == pytest.approx(dense.grad_norm, abs=1e-6)
                losses.add(round(dense.loss, 4))
            assert len(losses) == (2 if len(batch) > 1 else 1)  # the two aggregations differ


def _temperatures(model_dir: Path, batch: TokenBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    trainer = start_trainer(model_dir, run_config())
    return [trainer.logprobs(batch, FULL, temperature=t) for t in (0.5, 2.0)]


def test_logprobs_are_those_of_the_distribution_at_the_sampling_temperature(
    tiny_model_dir: Callable[..., Path],
):
    model_dir, batch = tiny_model_dir(**MODEL), random_batch()
    [answers] = run_ranks(1, _temperatures, model_dir, batch)
    for temperature, (logprobs, entropies) in zip((0.5, 2.0), answers, strict=True):
        with torch.no_grad():
            expected = dense_logprobs(dense_model(model_dir), batch, FULL, temperature=temperature)
        torch.testing.assert_close(logprobs, expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies, expected[1], atol=1e-5, rtol=0)


def _ratios(model_dir: Path, batch: TokenBatch) -> list[dict[str, float]]:
    trainer = start_trainer(model_dir, run_config())
    old, _ = trainer.logprobs(batch, INTERNAL)
    first = trainer.update(batch.with_old_logprobs(old), INTERNAL, lr=1e-3).metrics
    second = trainer.update(batch.with_old_logprobs(old), INTERNAL, lr=1e-3).metrics
    return [dict(first), dict(second)]


def test_the_first_update_after_the_old_logprobs_has_a_ratio_of_one(
    tiny_model_dir: Callable[..., Path],
):
    [[first, second]] = run_ranks(1, _ratios, tiny_model_dir(**MODEL), random_batch())
    assert first["update/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert first["update/kl_to_old_nats"] == pytest.approx(0, abs=1e-6)
    assert first["update/ratio_clipped_fraction"] == 0
    assert second["update/kl_to_old_nats"] > 1e-5
    assert second["update/ratio_mean"] != pytest.approx(1, abs=1e-6)


def _with_and_without_old_logprobs(
    model_dir: Path, layout: dict[str, Any], batch: TokenBatch
) -> list[dict[str, Any]]:
    """For each policy, an update after a pass for its old log-probs, and the same without one."""
    config = replace(run_config(parallel=layout), rollout=RolloutConfig(temperature=0.7))
    one, other = start_trainer(model_dir, config), another_trainer(model_dir, config)
    answers = []
    for policy in (INTERNAL, FULL):
        scores = one.logprobs(batch, policy, temperature=0.7)
        passed = one.update(batch.with_old_logprobs(scores[0]), policy, lr=1e-2)
        skipped = other.update(batch, policy, lr=1e-2)
        assert passed.scores is None
        assert skipped.scores is not None
        answers.append(
            {
                "metrics": [passed.metrics, skipped.metrics],
                "scores": [scores, skipped.scores],
                "weights": [snapshot(one), snapshot(other)],
            }
        )
    return answers


@pytest.mark.parametrize(
    ("ranks", "layout"), cases(LAYOUTS, slow={"TP2 DP2 SP distributed optimizer"})
)
def test_without_old_logprobs_an_update_is_the_same_to_the_bit_and_says_what_the_pass_would(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    model_dir, batch = tiny_model_dir(**MODEL), random_batch()
    for answers in run_ranks(ranks, _with_and_without_old_logprobs, model_dir, layout, batch):
        for answer in answers:
            passed, skipped = answer["metrics"]
            assert passed == skipped
            assert skipped["update/ratio_mean"] == 1
            assert skipped["update/kl_to_old_nats"] == 0
            for scored in zip(*answer["scores"], strict=True):
                assert torch.equal(*scored)
            before, after = answer["weights"]
            assert all(torch.equal(before[name], after[name]) for name in before)


def _largest_tensor(model_dir: Path, batch: TokenBatch, policy: Any) -> int:
    config = run_config(trainer={"microbatch_size": len(batch), "logprob_chunk_tokens": 4})
    trainer = start_trainer(model_dir, config)
    with LargestTensor() as seen:
        old, _ = trainer.logprobs(batch, policy)
        trainer.update(batch.with_old_logprobs(old), policy, lr=1e-3)
    return seen.numel


@pytest.mark.parametrize("policy", [FULL, INTERNAL], ids=str)
def test_no_tensor_of_an_update_is_as_large_as_the_logits_of_its_tokens(
    policy: Any, tiny_model_dir: Callable[..., Path]
):
    vocab = 1021
    model_dir = tiny_model_dir(**MODEL | {"vocab": vocab, "tied": True, "hidden": 16})
    batch = random_batch(responses=16, vocab=vocab)
    assert batch.response_tokens > 100
    [largest] = run_ranks(1, _largest_tensor, model_dir, batch, policy)
    assert largest < 40 * vocab  # the model has 16 rows of it, gradients and moments apart
