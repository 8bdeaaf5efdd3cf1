"""How good is a model that answers every question n times, and how sure is that?

::

    Avg@k    mean over questions of the mean correctness of k = n responses
    Pass@k   mean over questions of 1 - C(n - c, k) / C(n, k), where c of the n are correct: the
             chance that k of them, drawn without putting back, have a correct one (Chen et al.
             2021, arXiv 2107.03374). Its expectation is that of k fresh responses, for all k <= n

A response is correct for Pass@k if it has full marks, `CORRECT_FROM`: a share of them is none.

Both are means over questions, and their intervals are percentiles of the same mean over questions
drawn anew with replacement. A question's number carries the noise of its own responses, so the
interval covers both: other questions of this kind, and other responses. It is wider than what a
second run on the same questions varies by. Where all questions have one value it has no width; that
says that the questions cannot tell, not that the value is sure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

CORRECT_FROM = 1 - 1e-9  # of 1, in correctness
_DRAWN_AT_ONCE = 2**22  # counts of questions, which bounds the memory that resampling takes


class Estimate(NamedTuple):
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float


def pass_at_k(*, n: int, correct: int, k: int) -> float:
    """The chance that `k` of `n` responses have one of the `correct` ones; exact, then rounded
    once.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} correct ones among {n}")
    ways = comb(n, k)
    return (ways - comb(n - correct, k)) / ways  # whole numbers: no product that loses digits


def passes(correctness: Iterable[Sequence[float]], k: int) -> list[float]:
    """Pass@k of each question, from the correctness of its responses, `[questions][responses]`."""
    of_counts: dict[tuple[int, int], float] = {}
    values = []
    for responses in correctness:
        counts = len(responses), sum(value >= CORRECT_FROM for value in responses)
        if counts not in of_counts:
            of_counts[counts] = pass_at_k(n=counts[0], correct=counts[1], k=k)
        values.append(of_counts[counts])
    return values


def resampled_means(values: np.ndarray, *, samples: int, seed: Sequence[int]) -> np.ndarray:
    """Means of `values [questions, numbers]` over as many questions drawn with replacement,
    `[samples, numbers]`. All numbers of a sample are of the same questions.
    """
    questions, chances = len(values), np.full(len(values), 1 / len(values))
    random, means = np.random.default_rng(seed), []
    step = max(1, _DRAWN_AT_ONCE // questions)
    for start in range(0, samples, step):
        times_drawn = random.multinomial(questions, chances, size=min(step, samples - start))
        means.append(times_drawn @ values / questions)
    return np.concatenate(means)


def interval(means: np.ndarray, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of `means [samples]`."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
