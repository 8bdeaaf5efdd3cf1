from __future__ import annotations

import math
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest

from megatron_bupo.analysis.moments import Moments, pooled
from megatron_bupo.intervals import student_quantile

LENGTHS = [3, 1, 7, 2]


@pytest.fixture
def values() -> np.ndarray:
    random = np.random.default_rng(0)
    return random.normal(5, 1, size=(2, sum(LENGTHS))).astype(np.float32)


def test_every_token_counts_alike(values: np.ndarray):
    found = pooled(Moments.of({"x": values}, LENGTHS), confidence=0.95)["x"]
    for layer, row in enumerate(values.tolist()):
        assert found.mean[layer] == pytest.approx(fmean(row), abs=1e-12)
        assert found.standard_deviation[layer] == pytest.approx(stdev(row), abs=1e-12)


def test_a_mean_is_as_uncertain_as_its_responses(values: np.ndarray):
    found = pooled(Moments.of({"x": values[0]}, LENGTHS), confidence=0.95)["x"]
    mean, squares, start = fmean(values[0].tolist()), 0.0, 0
    for length in LENGTHS:  # residuals summed over each response, then squared
        squares += sum(float(x) - mean for x in values[0, start : start + length]) ** 2
        start += length
    error = math.sqrt(4 / 3 * squares) / sum(LENGTHS)
    assert float(found.standard_error) == pytest.approx(error, abs=1e-12)
    assert float(found.high - found.mean) == pytest.approx(3.182446 * error, abs=1e-6)
    assert float(found.mean - found.low) == pytest.approx(3.182446 * error, abs=1e-6)


def test_responses_of_one_token_are_a_plain_sample(values: np.ndarray):
    row = values[0]
    found = pooled(Moments.of({"x": row}, [1] * len(row)), confidence=0.9)["x"]
    assert float(found.standard_error) == pytest.approx(stdev(row.tolist()) / math.sqrt(len(row)))


def test_parts_joined_are_the_whole_bit_for_bit(values: np.ndarray):
    whole = Moments.of({"x": values}, LENGTHS)
    cut = sum(LENGTHS[:2])
    parts = [
        Moments.of({"x": values[:, :cut]}, LENGTHS[:2]),
        Moments.of({"x": values[:, cut:]}, LENGTHS[2:]),
    ]
    joined = Moments.joined(parts)
    assert np.array_equal(joined.tokens, whole.tokens)
    assert np.array_equal(joined.mean["x"], whole.mean["x"])
    assert np.array_equal(joined.squares["x"], whole.squares["x"])


def test_one_response_says_nothing_of_its_uncertainty(values: np.ndarray):
    found = pooled(Moments.of({"x": values[0]}, [values.shape[1]]), confidence=0.95)["x"]
    assert math.isnan(found.standard_error)
    assert math.isnan(found.low)
    assert not math.isnan(found.standard_deviation)
    assert math.isnan(pooled(Moments.of({"x": values[0, :1]}, [1]), confidence=0.95)["x"][1])


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),  # of printed tables
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.99, 3, 5.8409), (0.95, 19, 2.093), (0.9, 8, 1.8595)],
)  # fmt: skip
def test_quantiles_are_those_of_tables(confidence: float, freedom: int, expected: float):
    assert student_quantile(confidence, freedom) == pytest.approx(expected, abs=5e-5)


def test_many_responses_have_a_normal_mean():
    for freedom in (9_999, 10_000):
        normal = NormalDist().inv_cdf(0.975)
        assert student_quantile(0.95, freedom) == pytest.approx(normal, abs=5e-4)
