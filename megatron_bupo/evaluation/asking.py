"""What is a model asked, and what came of it? By `megatron-bupo eval` and while training alike.

A response is drawn with the noise of its seed, question and number, so where the engine is
reproducible nothing depends on how the questions are cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple, Self

from megatron_bupo.evaluation.scores import passes
from megatron_bupo.rewards.grader import Grading
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.types import Grade, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class Benchmark:
    """Questions, and how they are asked."""

    name: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    pass_at: Sequence[int]  # k of Pass@k, in order


@dataclass(frozen=True)
class Answered:
    """A question with all responses to it and their grades."""

    prompt: Prompt
    rollouts: Sequence[Rollout]
    grades: Sequence[Grade]


class Marks(NamedTuple):
    """What is left of a question when its responses have been graded, an entry per response."""

    correctness: tuple[float, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]  # had not ended when it was cut
    warnings: tuple[str | None, ...]  # why grading failed

    @classmethod
    def of(cls, answered: Answered) -> Self:
        """The marks of a question."""
        rollouts, grades = answered.rollouts, answered.grades
        return cls(
            tuple(grade.correctness for grade in grades),
            tuple(len(rollout.response_ids) for rollout in rollouts),
            tuple(rollout.finish_reason != "stop" for rollout in rollouts),
            tuple(grade.warning for grade in grades),
        )


def ask(
    benchmark: Benchmark,
    engine: RolloutEngine,
    grader: Grading,
    *,
    responses_per_batch: int,
    first: int = 0,
) -> Iterator[list[Answered]]:
    """The answers to the questions from `first` on, in order, a batch at a time: whole questions
    with about `responses_per_batch` responses, at least one question. Collective.
    """
    size = max(1, responses_per_batch // benchmark.sampling.responses_per_prompt)
    for start in range(first, len(benchmark.prompts), size):
        groups = engine.generate(benchmark.prompts[start : start + size], benchmark.sampling)
        grades = grader.grade(groups)
        yield [
            Answered(group.prompt, group.rollouts, its_grades)
            for group, its_grades in zip(groups, grades, strict=True)
        ]


def avg_at_k(marks: Sequence[Marks]) -> float:
    """Mean correctness; all questions have as many responses."""
    return fmean(value for question in marks for value in question.correctness)


def measures(benchmark: Benchmark, marks: Sequence[Marks]) -> dict[str, float]:
    """`NAME_avg_at_k` and `NAME_pass_at_k` as a training run logs them."""
    count = benchmark.sampling.responses_per_prompt
    correctness = [question.correctness for question in marks]
    return {f"{benchmark.name}_avg_at_{count}": avg_at_k(marks)} | {
        f"{benchmark.name}_pass_at_{k}": fmean(passes(correctness, k)) for k in benchmark.pass_at
    }
