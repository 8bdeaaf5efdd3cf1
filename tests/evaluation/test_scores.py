from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import comb, sqrt
from statistics import fmean

import numpy as np
import pytest

from megatron_bupo.evaluation.scores import (
    CORRECT_FROM,
    interval,
    pass_at_k,
    passes,
    resampled_means,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    for n, correct in product(range(1, 8), range(8)):
        if correct <= n:
            responses = [i < correct for i in range(n)]
            for k in range(1, n + 1):
                subsets = [any(subset) for subset in combinations(responses, k)]
                assert pass_at_k(n=n, correct=correct, k=k) == sum(subsets) / len(subsets)


@pytest.mark.parametrize("k", [1, 4, 16, 64, 256])
def test_pass_at_k_is_exact_to_the_last_bit_for_many_responses(k: int):
    n = 300
    for correct in range(n + 1):
        missed = Fraction(1)
        for i in range(k):
            missed *= Fraction(max(n - correct - i, 0), n - i)
        assert pass_at_k(n=n, correct=correct, k=k) == float(1 - missed)


def test_pass_at_k_has_no_bias():
    n, k, p = 20, 8, 0.07
    law = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance * pass_at_k(n=n, correct=c, k=k) for c, chance in enumerate(law))
    assert abs(mean - (1 - (1 - p) ** k)) < 1e-15


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 0, 5), (4, 0, 0), (4, 5, 1), (4, -1, 1)])
def test_what_cannot_be_told_is_refused(n: int, correct: int, k: int):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n=n, correct=correct, k=k)


def test_only_full_marks_are_correct():
    assert CORRECT_FROM < 1
    marks = [(1.0, 0.999, 0.5, -1.0), (1.0, 1.0, 2.0, 0.0), (0.9, 0.9, 0.9, 0.9)]
    assert passes(marks, 2) == [1 / 2, 1.0, 0.0]  # 1, 3 and 0 of 4


def test_resampled_means_follow_the_law_of_all_resamples():
    values = np.array([[0.0, 1.0], [0.5, 0.0], [1.0, 0.25]])
    exact = np.array([values[list(drawn)].mean(0) for drawn in product(range(3), repeat=3)])
    means = resampled_means(values, samples=20_000, seed=(0,))
    assert means.shape == (20_000, 2)
    for sampled, of_all in zip(means.T, exact.T, strict=True):
        levels, counts = np.unique(of_all.round(9), return_counts=True)
        for level, count in zip(levels, counts / 27, strict=True):
            share = (np.abs(sampled - level) < 1e-8).mean()
            assert abs(share - count) < 6 * sqrt(count / 20_000)  # 1e-8 a level
    joint = {tuple(row) for row in means.round(9)}
    assert joint == {tuple(row) for row in exact.round(9)}  # of the same questions


def test_resampling_is_reproducible_whatever_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    values = np.linspace(0, 1, 50)[:, None]
    whole = resampled_means(values, samples=100, seed=(3, 1))
    monkeypatch.setattr("megatron_bupo.evaluation.scores._DRAWN_AT_ONCE", 350)
    assert np.abs(resampled_means(values, samples=100, seed=(3, 1)) - whole).max() < 1e-12
    assert np.abs(resampled_means(values, samples=100, seed=(3, 2)) - whole).max() > 0.01


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence: float):
    """Avg@4 of 60 questions drawn from a population whose mean is known, 400 times. The percentile
    bootstrap of so few questions covers up to 2 % too little; beyond that, a right one fails with a
    chance of 1e-6 (4.9 standard errors of a share).
    """
    random, runs = np.random.default_rng(0), 400
    covered = []
    for run in range(runs):
        chances = random.beta(0.5, 1.0, size=60)  # many near 0, mean 1/3
        marks = random.binomial(4, chances) / 4
        low, high = interval(
            resampled_means(marks[:, None], samples=400, seed=(run,))[:, 0], confidence
        )
        covered.append(low <= 1 / 3 <= high)
    error = sqrt(confidence * (1 - confidence) / runs)
    assert confidence - 0.02 - 4.9 * error < fmean(covered) < confidence + 0.01 + 4.9 * error
