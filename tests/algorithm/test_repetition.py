from __future__ import annotations

import pytest

from megatron_bupo.algorithm.repetition import repeated_fraction


def test_a_text_that_says_nothing_twice_has_no_repetition():
    assert repeated_fraction(range(100)) == 0.0


@pytest.mark.parametrize("tokens", [4, 5, 50])
def test_one_token_again_and_again_is_new_once(tokens: int):
    assert repeated_fraction([7] * tokens) == pytest.approx(1 - 1 / (tokens - 3))


@pytest.mark.parametrize(("period", "rounds"), [(6, 2), (6, 5), (9, 3)])
def test_a_period_is_new_in_its_first_round(period: int, rounds: int):
    grams = period * rounds - 3
    assert repeated_fraction([*range(period)] * rounds) == pytest.approx(1 - period / grams)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_what_is_shorter_than_an_n_gram_has_none(tokens: int):
    assert repeated_fraction([7] * tokens) == 0.0


def test_order_counts():
    assert repeated_fraction([1, 2, 3, 4, 3, 2, 1]) == 0.0
    assert repeated_fraction([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(1 - 2 / 5)
