"""A response that a budget cut before its first token is no response to learn from, and no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from megatron_bupo.algorithm.advantages import group_relative_advantages
from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.data.packing import pack
from megatron_bupo.record.measures import policy_measures, rollout_measures
from megatron_bupo.record.rollout_files import Learned, grouped, read_rollouts, write_rollouts
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup, TokenBatch
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import run_config, snapshot, start_trainer
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIS: dict[str, Any] = {"rollout_correction": "tis", "tis_cap": 1.1}
CASES = [
    (policy, aggregation)
    for policy in (InternalLayerPolicy(2), FULL)
    for aggregation in ("token_mean", "sequence_mean")
]
LENGTHS = [[5, 0, 3], [0, 0, 0], [0, 7, 0], [1, 1, 0]]  # of the responses to each prompt
STEPS = [LENGTHS, [[0, 0, 0]] * 4]
GRADES = [[Grade(float((i + j) % 2)) for j in range(3)] for i in range(len(LENGTHS))]


def groups_of(lengths: list[list[int]]) -> list[RolloutGroup]:
    generator = torch.Generator().manual_seed(3)

    def rollout(prompt: Prompt, size: int) -> Rollout:
        ids = torch.randint(0, 64, (size,), generator=generator).tolist()
        logprobs = (-5 * torch.rand(size, generator=generator)).tolist()
        reason = "length" if size else "abort"
        return Rollout(prompt, tuple(ids), "", tuple(logprobs), None, reason, policy_version=0)

    prompts = [Prompt(i, tuple(range(3 + i)), "", "") for i in range(len(lengths))]
    return [
        RolloutGroup(prompt, tuple(rollout(prompt, size) for size in sizes))
        for prompt, sizes in zip(prompts, lengths, strict=True)
    ]


def batch_of(groups: list[RolloutGroup]) -> TokenBatch:
    rewards = torch.tensor([[grade.reward for grade in group] for group in GRADES])
    return pack(groups, pad_id=0).with_advantages(group_relative_advantages(rewards))


def _train(model_dir: Path, run_dir: Path) -> list[list[dict[str, float]]]:
    """For each of CASES a step of two minibatches, the second of few tokens, and one of none."""
    trainer = start_trainer(model_dir, run_config(algorithm=TIS, parallel={"pp": 2, "dp": 2}))
    config, answers = trainer.config, []
    for policy, aggregation in CASES:
        algorithm = replace(config.algorithm, loss_aggregation=aggregation)
        trainer.config = replace(config, algorithm=algorithm)
        reports = []
        for step, lengths in enumerate(STEPS):
            groups = groups_of(lengths)
            batch = batch_of(groups)
            scores = trainer.logprobs(batch, policy)
            batch = batch.with_old_logprobs(scores[0])
            halves = [trainer.update(half, policy, lr=0.0) for half in batch.minibatches(2)]
            reports += [dict(report.metrics) for report in halves]
            known = policy_measures(policy, scores, batch)
            reports.append(known | rollout_measures(groups, GRADES))
            if dist.get_rank() == 0:
                write_rollouts(run_dir, step, groups, GRADES, Learned(policy, batch, scores))
        answers.append(reports)
    assert all(bool(tensor.isfinite().all()) for tensor in snapshot(trainer).values())
    return answers


def expected(model: Any, policy: Any, aggregation: str) -> list[dict[str, float]]:
    """Loss and gradient of the halves of the first step, by loops."""
    batch = batch_of(groups_of(LENGTHS))
    with torch.no_grad():
        batch = batch.with_old_logprobs(dense_logprobs(model, batch, policy)[0])
    cap = TIS["tis_cap"] if policy == FULL else None
    halves = [
        dense_update(model, half, policy, aggregation=aggregation, tis_cap=cap)
        for half in batch.minibatches(2)
    ]
    return [{"update/loss": half.loss, "update/grad_norm": half.grad_norm} for half in halves]


@pytest.mark.slow
def test_empty_responses_weigh_nothing_on_any_rank_and_are_written_down(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(scale=0.12)
    wanted = [expected(dense_model(model_dir), *case) for case in CASES]
    for answers in run_ranks(4, _train, model_dir, tmp_path):
        for reports, halves in zip(answers, wanted, strict=True):
            assert all(math.isfinite(x) for report in reports for x in report.values())
            for report, half in zip(reports[:2], halves, strict=True):
                assert {key: report[key] for key in half} == pytest.approx(half, rel=1e-5)
            for report in reports[3:5]:
                assert report["update/loss"] == report["update/grad_norm"] == 0
            assert not any("gap" in key or "entropy" in key for key in reports[5])
    for step, lengths in enumerate(STEPS):
        read = grouped(read_rollouts(tmp_path / "rollouts" / f"step-{step:06d}.jsonl"))
        assert [[len(r.response_ids) for r in group.rollouts] for group in read] == lengths
