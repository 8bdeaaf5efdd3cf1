"""Every loss and aggregation under the layouts that could tell them apart, against loops over the
responses and tokens of a dense model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.schema import RolloutConfig
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    full_gradients,
    random_batch,
    run_config,
    start_trainer,
    with_stale_logprobs,
)
from tests.ranks import run_ranks
from tests.tiers import cases

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import TokenBatch

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
LONGEST = 31
CLIP = {"clip_low": 0.15, "clip_high": 0.3}
INTERNAL = InternalLayerPolicy(2)
LAYOUTS: dict[str, tuple[int, dict[str, Any], Policy, tuple[int, ...]]] = {  # micro-batches last
    "one rank": (1, {}, FULL, (1, 3)),
    "CP2 PP2": (4, {"cp": 2, "pp": 2}, INTERNAL, (2,)),
    "TP2 DP2 SP distributed optimizer": (
        4,
        {"tp": 2, "dp": 2, "sp": True, "distributed_optimizer": True},
        FULL,
        (2,),
    ),
}
LOSSES = [
    ("clipped", "constant_length", 0.0),
    ("clipped", "token_mean", 0.7),
    ("gspo", "token_mean", 0.0),
    ("gspo", "sequence_mean", 0.0),
    ("cispo", "token_mean", 0.0),
    ("unclipped", "sequence_mean", 0.3),
]
Answer = tuple[dict[str, float], dict[str, torch.Tensor]]


def _updates(
    model_dir: Path,
    layout: dict[str, Any],
    batch: TokenBatch,
    policy: Policy,
    sizes: tuple[int, ...],
) -> list[Answer]:
    """Metrics and gradients under each of LOSSES, in micro-batches of each of `sizes`."""
    trainer = start_trainer(model_dir, run_config(parallel=layout, algorithm=CLIP))
    config, answers = trainer.config, []
    for (loss, aggregation, entropy), size in product(LOSSES, sizes):
        trainer.config = replace(
            config,
            trainer=replace(config.trainer, microbatch_size=size),
            rollout=RolloutConfig(max_response_tokens=LONGEST),
            algorithm=replace(
                config.algorithm,
                loss=loss,
                loss_aggregation=aggregation,
                entropy_coefficient=entropy,
            ),
        )
        metrics = dict(trainer.update(batch, policy, lr=0.0).metrics)
        answers.append((metrics, full_gradients(trainer)))
    return answers


@pytest.fixture
def make_batch(tiny_model_dir: Callable[..., Path]) -> Callable[[Policy], TokenBatch]:
    """Responses, one of them empty and another that does not learn, some updates after their old
    log-probs; whole responses have ratios on either side of the clip range.
    """

    def batch_for(policy: Policy) -> TokenBatch:
        batch = random_batch(responses=6).with_learners(torch.arange(6) != 3)
        with torch.no_grad():
            logprobs, _ = dense_logprobs(dense_model(tiny_model_dir(**MODEL)), batch, policy)
        batch = with_stale_logprobs(batch, logprobs + torch.linspace(-1.5, 0.8, 6)[:, None])
        assert batch.advantages is not None
        return batch.with_advantages(batch.advantages)

    return batch_for


@pytest.mark.parametrize(
    ("ranks", "layout", "policy", "sizes"),
    cases(LAYOUTS, slow={"TP2 DP2 SP distributed optimizer"}),
)
def test_every_loss_and_its_gradient_are_those_of_loops_in_any_layout_and_cut(
    ranks: int,
    layout: dict[str, Any],
    policy: Policy,
    sizes: tuple[int, ...],
    tiny_model_dir: Callable[..., Path],
    make_batch: Callable[[Policy], TokenBatch],
):
    model_dir, batch = tiny_model_dir(**MODEL), make_batch(policy)
    model = dense_model(model_dir)
    expected = [
        dense_update(
            model,
            batch,
            policy,
            kind=loss,
            aggregation=aggregation,
            longest=LONGEST,
            entropy_coefficient=entropy,
            **CLIP,
        )
        for loss, aggregation, entropy in LOSSES
    ]
    assert len({round(dense.loss, 4) for dense in expected}) == len(LOSSES)
    for answers in run_ranks(ranks, _updates, model_dir, layout, batch, policy, sizes):
        for number, (metrics, grads) in enumerate(answers):
            (loss, _, coefficient), dense = (
                LOSSES[number // len(sizes)],
                expected[number // len(sizes)],
            )
            assert metrics["update/loss"] == pytest.approx(dense.loss, rel=1e-6, abs=1e-6)
            assert metrics["update/grad_norm"] == pytest.approx(dense.grad_norm, rel=1e-5)
            largest = max(float(g.abs().max()) for g in dense.grads.values())
            gap = max(float((grads[n] - g).abs().max()) for n, g in dense.grads.items())
            assert gap < 2e-6 * largest
            clipped = metrics["update/ratio_clipped_fraction"]
            assert (clipped > 0.05) == (loss != "unclipped")
            assert ("update/entropy_nats" in metrics) == (coefficient > 0)
            if coefficient:
                mean = float(dense.entropies[batch.learning_mask].mean())
                assert metrics["update/entropy_nats"] == pytest.approx(mean, abs=1e-5)


def _without_old_logprobs(model_dir: Path, batch: TokenBatch) -> list[Any]:
    trainer = start_trainer(model_dir, run_config())
    scores = trainer.logprobs(batch, FULL)
    known = trainer.update(batch.with_old_logprobs(scores[0]), FULL, lr=0.0)
    fresh = trainer.update(batch, FULL, lr=0.0)
    return [scores, fresh.scores, known.metrics, fresh.metrics]


def test_responses_that_do_not_learn_are_scored_all_the_same_where_the_update_scores(
    tiny_model_dir: Callable[..., Path],
):
    batch = random_batch(responses=6).with_learners(torch.arange(6) != 0)
    assert batch.advantages is not None
    batch = batch.with_advantages(batch.advantages)
    [[scores, fresh, known, without]] = run_ranks(
        1, _without_old_logprobs, tiny_model_dir(**MODEL), batch
    )
    assert all(torch.equal(*pair) for pair in zip(scores, fresh, strict=True))
    assert fresh[0][0].any()
    assert known["update/loss"] == pytest.approx(without["update/loss"], abs=1e-7)
    assert known["update/grad_norm"] == pytest.approx(without["update/grad_norm"], rel=1e-6)
