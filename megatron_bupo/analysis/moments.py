"""Means over all response tokens, pooled, and how far they can be trusted.

Tokens of one response resemble each other, so they do not count as so many independent ones: the
uncertainty of a mean is that of its responses. With n_i tokens in response i, m_i their mean,
N = sum_i n_i and R responses::

    mean              m = sum_i n_i m_i / N                           (each token counts alike)
    standard error    s^2 = R / (R - 1) * sum_i n_i^2 (m_i - m)^2 / N^2
    interval          m -+ t s,  t of Student's distribution with R - 1 degrees of freedom

(the linearised variance of a ratio of sums over clusters: Cochran, Sampling Techniques, 6.3; the
sandwich estimator of a regression on a constant, clustered by response). The spread over tokens is
that of the merged squares (Chan, Golub and LeVeque)::

    M2 = sum_i M2_i + sum_i n_i (m_i - m)^2,   standard deviation sqrt(M2 / (N - 1))

So what must be kept of a response is its count, means and squares. They do not depend on what it
was read together with, nor do the sums over responses, which are taken in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_bupo.intervals import student_quantile

Array = NDArray[Any]


@dataclass(frozen=True)
class Moments:
    """Of responses in order; a column's arrays are `[responses]` or `[responses, layers]`, fp64."""

    tokens: Array  # [responses]
    mean: Mapping[str, Array]  # over the response's tokens
    squares: Mapping[str, Array]  # summed, of deviations from that mean

    @classmethod
    def of(cls, columns: Mapping[str, Array], lengths: Sequence[int]) -> Moments:
        """Of responses of `lengths`, whose tokens are laid end to end along the last axis."""
        ends = np.cumsum(lengths)
        mean, squares = {}, {}
        for name, values in columns.items():
            parts = np.split(values.astype(np.float64), ends[:-1], axis=-1)
            mean[name] = np.stack([part.mean(axis=-1) for part in parts])
            squares[name] = np.stack([part.var(axis=-1) * part.shape[-1] for part in parts])
        return cls(np.array(lengths, dtype=np.int64), mean, squares)

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of all `parts`, in order."""
        return cls(
            np.concatenate([part.tokens for part in parts]),
            {name: np.concatenate([part.mean[name] for part in parts]) for name in parts[0].mean},
            {
                name: np.concatenate([part.squares[name] for part in parts])
                for name in parts[0].squares
            },
        )


class Pooled(NamedTuple):
    """A column over all tokens, `[]` or `[layers]`; NaN: too few responses or tokens to say."""

    mean: Array
    standard_deviation: Array  # over tokens
    standard_error: Array  # of the mean
    low: Array  # the ends of its interval
    high: Array


def pooled(moments: Moments, *, confidence: float) -> dict[str, Pooled]:
    """Every column over all tokens, with intervals that hold with probability `confidence`."""
    responses, total = len(moments.tokens), int(moments.tokens.sum())
    reach = student_quantile(confidence, responses - 1) if responses > 1 else math.nan
    answers = {}
    for name, means in moments.mean.items():
        tokens = moments.tokens.reshape(-1, *[1] * (means.ndim - 1))
        mean = np.asarray((tokens * means).sum(axis=0) / total)
        away = means - mean
        squares = moments.squares[name].sum(axis=0) + (tokens * away**2).sum(axis=0)
        variance = squares / (total - 1) if total > 1 else np.full_like(mean, math.nan)
        error = np.full_like(mean, math.nan)
        if responses > 1:
            clusters = ((tokens * away) ** 2).sum(axis=0) * responses / (responses - 1)
            error = np.sqrt(clusters) / total
        answers[name] = Pooled(
            mean, np.sqrt(variance), error, mean - reach * error, mean + reach * error
        )
    return answers
