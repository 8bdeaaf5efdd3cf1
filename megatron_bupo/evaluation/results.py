"""What came of a suite: `OUT/results.json`.

::

    {"model": "Qwen3-4B",               the directory's name
     "benchmarks": {"AIME24": {
        "questions": 30,
        "responses_per_prompt": 32,
        "avg_at_k": {"value": 0.3688, "low": 0.27, "high": 0.47},
        "pass_at_k": {"1": {"value": ..., "low": ..., "high": ...}, "8": ...},
        "response_tokens_mean": 5120.3,
        "truncated_fraction": 0.12,     responses that had not ended
        "grader_warnings": 0,           responses that could not be graded, and count as wrong
        "seconds": 412.0,               of generating and grading
        "tokens_per_second": 11930.2}, ...},
     "average": {"value": 0.5851, "low": ..., "high": ...},     of avg_at_k over the benchmarks
     "confidence": 0.95,                of all intervals, see scores.py
     "engine": "sglang 0.5.10",
     "reproducible": true,              does the engine draw the same responses again?
     "settings": {...}}                 as in state.json

Shares are of 1. Seconds aside, a suite that was killed and went on has the same results as one
that was not, if the engine is reproducible.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from megatron_bupo.evaluation.asking import Benchmark, Marks, avg_at_k
from megatron_bupo.evaluation.scores import Estimate, interval, passes, resampled_means


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    confidence: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Score:
    """What came of one benchmark."""

    name: str
    questions: int
    responses_per_prompt: int
    avg: Estimate
    pass_at: Mapping[int, Estimate]
    resampled: np.ndarray  # avg of the resampled questions, `[samples]`
    tokens: int
    truncated_fraction: float
    grader_warnings: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {
            "questions": self.questions,
            "responses_per_prompt": self.responses_per_prompt,
            "avg_at_k": self.avg._asdict(),
            "pass_at_k": {str(k): estimate._asdict() for k, estimate in self.pass_at.items()},
            "response_tokens_mean": self.tokens / (self.questions * self.responses_per_prompt),
            "truncated_fraction": self.truncated_fraction,
            "grader_warnings": self.grader_warnings,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 3) if self.seconds else None,
        }


def score(
    benchmark: Benchmark, marks: Sequence[Marks], *, resampling: Resampling, seconds: float
) -> Score:
    """What the `marks` of all questions come to."""
    correctness = [question.correctness for question in marks]
    of_questions = [[fmean(of_one) for of_one in correctness]]
    of_questions += [passes(correctness, k) for k in benchmark.pass_at]
    seed = (resampling.seed, zlib.crc32(benchmark.name.encode()))  # benchmarks are independent
    values = np.array(of_questions).T
    means = resampled_means(values, samples=resampling.samples, seed=seed)
    first, *others = (interval(column, resampling.confidence) for column in means.T)
    return Score(
        name=benchmark.name,
        questions=len(marks),
        responses_per_prompt=benchmark.sampling.responses_per_prompt,
        avg=Estimate(avg_at_k(marks), *first),
        pass_at={
            k: Estimate(fmean(by_question), *ends)
            for k, by_question, ends in zip(
                benchmark.pass_at, of_questions[1:], others, strict=True
            )
        },
        resampled=means[:, 0],
        tokens=sum(chain.from_iterable(question.tokens for question in marks)),
        truncated_fraction=fmean(chain.from_iterable(question.truncated for question in marks)),
        grader_warnings=sum(w is not None for question in marks for w in question.warnings),
        seconds=seconds,
    )


def average(scores: Sequence[Score], *, confidence: float) -> Estimate:
    """The mean of Avg@k over the benchmarks, each of which was resampled by itself."""
    resampled = np.mean([s.resampled for s in scores], axis=0)
    return Estimate(fmean(s.avg.value for s in scores), *interval(resampled, confidence))
