"""What differs between methods beyond the noise of seeds? See compare_methods.py.

Two methods have runs with equal seeds: equal prompts in equal order, and responses drawn with
equal noise. So their results are compared in pairs: with d the mean difference over n seeds, s the
sample standard deviation of the differences and e = s / sqrt(n) its standard error, the interval is
d +- t e with t of Student's distribution with n - 1 degrees of freedom. Of c comparisons at 95 %
some 0.05 c exclude 0 by chance; at 1 - 0.05 / c (Bonferroni) hardly any.

At equal tokens: accuracy over the response tokens sampled so far, linear between evaluations, at
the largest budget that every run has reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from megatron_bupo.intervals import student_quantile

CONFIDENCE = 0.95
CLIPPED = "update/ratio_clipped_fraction"
PERPLEXITY = "probe/perplexity"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """What one run came to. Steps and tokens count from 0, before training."""

    steps: Sequence[int]  # behind the policy, at each evaluation
    tokens: Sequence[float]  # response tokens sampled until then, discarded groups too
    accuracy: Sequence[float]  # held-out, of the policy with so many steps
    entropy: Sequence[float]  # of the full policy at each step, nats
    clipped_fraction: float  # of tokens, in steps that train the policy
    step_s: float  # seconds of a step, without evaluation
    # Standard deviation of the last accuracy over other responses to the same prompts; NaN: unknown
    sampling_noise: float
    probed: Sequence[int] = ()  # steps behind the policy, at each probe
    perplexity: Sequence[float] = ()  # of the full policy on texts that stay the same, there
    left_at: int | None = None  # steps behind the policy when the guard ended its internal phase

    @classmethod
    def of(cls, records: Sequence[Record], questions: int | None = None) -> Curve:
        """Of a run's metrics, with so many held-out `questions`."""
        measured = [(0, 0.0, r["eval/initial_accuracy_mean"]) for r in records[:1]]
        sampled = accumulate(r["rollout/sampled_tokens"] for r in records)
        for record, tokens in zip(records, sampled, strict=True):
            if "eval/accuracy_mean" in record:
                measured.append((record["step"] + 1, tokens, record["eval/accuracy_mean"]))
        steps, at, accuracy = zip(*measured, strict=True)
        probes = [(r["step"], r[PERPLEXITY]) for r in records if PERPLEXITY in r]
        left = [r["step"] for r in records if r.get("guard/tripped")]
        return cls(
            steps,
            at,
            accuracy,
            [r.get("entropy/full_nats", math.nan) for r in records],
            fmean(r[CLIPPED] for r in records if CLIPPED in r),
            fmean(r["time/step_s"] - r.get("time/evaluate_s", 0.0) for r in records),
            sampling_noise(records[-1], questions),
            [step for step, _ in probes],
            [perplexity for _, perplexity in probes],
            left[0] if left else None,
        )

    def at_tokens(self, budget: float, values: Sequence[float] | None = None) -> float:
        """The accuracy after `budget` tokens, or another of `values` at evaluations."""
        return float(np.interp(budget, self.tokens, self.accuracy if values is None else values))

    def entropy_at_a_third(self) -> float:
        """Of the full policy, nats: the mean of five steps around a third of the run."""
        third = len(self.entropy) // 3
        return fmean(self.entropy[max(0, third - 2) : third + 3])


def sampling_noise(record: Record, questions: int | None) -> float:
    """Of a mean accuracy over `questions` with k responses each, from what `record` has of them:
    Pass@2 - Avg@k estimates the mean of p (1 - p) over questions without bias.
    """
    names = [key.removesuffix("_pass_at_2") for key in record if key.endswith("_pass_at_2")]
    found = [(key, name) for name in names for key in record if key.startswith(f"{name}_avg_at_")]
    if questions is None or len(found) != 1:
        return math.nan
    ((avg, name),) = found
    spread = max(0.0, record[f"{name}_pass_at_2"] - record[avg])
    return math.sqrt(spread / (questions * int(avg.rpartition("_")[2])))


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    sd: float  # sample standard deviation; NaN of one seed
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value for each seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


class Difference(NamedTuple):
    """A mean of paired differences, with its intervals' half-widths; NaN of one pair."""

    mean: float
    error: float  # standard
    half: float  # of the interval at CONFIDENCE
    half_of_all: float  # at the confidence at which all comparisons hold together, by Bonferroni

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float], *, comparisons: int):
        """Of what each seed came to, where both have it; one of so many `comparisons`."""
        pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        mean, sd, n = Spread.of(pairs)
        error = sd / math.sqrt(n)
        if n < 2:
            return cls(mean, error, math.nan, math.nan)
        at_all = 1 - (1 - CONFIDENCE) / comparisons
        return cls(
            mean,
            error,
            error * student_quantile(CONFIDENCE, n - 1),
            error * student_quantile(at_all, n - 1),
        )

    @property
    def stars(self) -> int:
        """0: the interval includes 0; 1: it does not; 2: nor does the wider one."""
        return (abs(self.mean) > self.half) + (abs(self.mean) > self.half_of_all)


def budget_of(curves: Sequence[Curve]) -> float:
    """The most response tokens that every run has sampled when it was last evaluated."""
    return min(curve.tokens[-1] for curve in curves)
