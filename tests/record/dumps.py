"""Rollouts of a step as a run dumps them, for what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_bupo.algorithm.bupo import InternalLayerPolicy
from megatron_bupo.data.packing import pack
from megatron_bupo.record.rollout_files import Learned, write_rollouts
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup, TokenBatch, VersionSpan

ROW = {"level": [3, None], "source": "naïve\u2028</script>"}


def rollout(
    prompt: Prompt, ids: Sequence[int], *, text: str = "", version: int = 12, **more: object
) -> Rollout:
    """A response of `ids`, whose numbers are what they happen to be."""
    numbers = torch.randn(2, len(ids)).abs()
    made = Rollout(
        prompt=prompt,
        response_ids=tuple(ids),
        text=text,
        rollout_logprobs=tuple((-numbers[0]).tolist()),
        entropies=tuple(numbers[1].tolist()),
        finish_reason="stop",
        policy_version=version,
        versions=(VersionSpan(version, 0, len(ids)),),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def two_groups() -> tuple[list[RolloutGroup], list[list[Grade]]]:
    """The same prompt asked twice, two responses each; one grade failed."""
    prompt = Prompt(7, (4, 10, 9, 11), "13", "4+9=", ROW)
    moved = (VersionSpan(11, 0, 2), VersionSpan(12, 2, 3))
    cut = {"finish_reason": "abort", "server": "http://10.0.0.5:30000", "attempts": 2}
    first = rollout(prompt, [1, 3, 14], text="13"), rollout(prompt, [1, 14], cached_tokens=3)
    second = rollout(prompt, [1, 3, 3], version=11, versions=moved, **cut), rollout(prompt, [2])
    grades = [[Grade(1.0), Grade(0.25)], [Grade(0.0, "took longer than 5 s"), Grade(0.5)]]
    return [RolloutGroup(prompt, first), RolloutGroup(prompt, second)], grades


def learned(groups: Sequence[RolloutGroup]) -> Learned:
    """What internal layer 6 learned from `groups`, with numbers that happen to be."""
    batch: TokenBatch = pack(groups, 0)
    batch = batch.with_advantages(torch.tensor([[0.5, -0.5], [-1.0, 1.0]]))
    scores = torch.randn(batch.input_ids.shape), torch.rand(batch.input_ids.shape)
    batch = batch.with_old_logprobs(scores[0]).with_ref_logprobs(scores[0] - 0.25)
    return Learned(InternalLayerPolicy(6), batch, scores)


def dump(run_dir: Path, *steps: int) -> Path:
    """`run_dir` with rollouts of `steps`; returns it."""
    for step in steps:
        groups, grades = two_groups()
        write_rollouts(run_dir, step, groups, grades, learned(groups))
    return run_dir
