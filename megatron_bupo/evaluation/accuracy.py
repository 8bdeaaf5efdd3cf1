"""Accuracy on held-out prompts, sampled from the full policy: avg@k of `k` responses per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_bupo.rewards.grader import Grading
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.types import Prompt, Sampling


def accuracy(
    engine: RolloutEngine, grader: Grading, prompts: Sequence[Prompt], sampling: Sampling
) -> float:
    """Mean reward over `prompts` and their responses. Collective."""
    grades = grader.grade(engine.generate(prompts, sampling))
    return fmean(grade.reward for group in grades for grade in group)
