from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_bupo.algorithm.planning_measures import (
    following_entropy,
    frequency_entropy,
    perplexity,
    share_of,
    uses,
)
from megatron_bupo.algorithm.planning_tokens import StrategicGrams

WORDS = "let me check if we can wait , so the 12".split()


def random_pairs(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(rng.choice("abc"), rng.choice("uvwxyz"[: rng.randrange(1, 7)])) for _ in range(200)]


@pytest.mark.parametrize("seed", range(5))
def test_entropies_of_frequencies_are_those_of_a_loop_over_what_there_is(seed: int):
    pairs = random_pairs(seed)
    grams = [gram for gram, _ in pairs]
    share = {gram: grams.count(gram) / len(grams) for gram in set(grams)}
    assert frequency_entropy(grams) == pytest.approx(-sum(p * math.log(p) for p in share.values()))
    given = 0.0
    for gram, weight in share.items():
        after = [word for g, word in pairs if g == gram]
        shares = [after.count(word) / len(after) for word in set(after)]
        given -= weight * sum(p * math.log(p) for p in shares)
    assert following_entropy(pairs) == pytest.approx(given)


def test_one_gram_has_no_entropy_and_equally_many_of_each_have_the_log_of_their_number():
    assert frequency_entropy(["wait"] * 7) == frequency_entropy([]) == 0.0
    assert frequency_entropy(list("abcdefghij") * 3) == pytest.approx(math.log(10))


def test_what_always_follows_has_no_entropy_and_what_is_free_has_its_own():
    assert following_entropy([("a", "x"), ("b", "y"), ("c", "x")] * 9) == 0.0
    free = [(gram, word) for gram in "abc" for word in "vwxyz"]
    assert following_entropy(free) == pytest.approx(math.log(5))


@pytest.mark.parametrize("seed", range(8))
def test_a_gram_is_used_where_no_longer_one_holds_it_and_is_followed_by_the_next_word(seed: int):
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(60)]
    grams = ["let me", "let me check", "me check if", "we can", "so", "wait , so", "can wait"]
    spans = {
        (start, start + len(gram.split())): gram
        for gram in grams
        for start in range(len(words))
        if words[start : start + len(gram.split())] == gram.split()
    }
    outermost = [
        (gram, words[end] if end < len(words) else None)
        for (start, end), gram in sorted(spans.items())
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans)
    ]
    text = " ".join(words)
    assert uses(text, StrategicGrams(grams).find(text)) == outermost


def test_perplexity_and_shares_are_those_of_a_loop_over_tokens():
    logprobs, mask, other = -torch.rand(5, 9), torch.rand(5, 9) < 0.5, torch.rand(5, 9) < 0.4
    inside = [x for x, m in zip(logprobs.flatten(), mask.flatten(), strict=True) if m]
    mean = sum(float(x) for x in inside) / len(inside)
    assert perplexity(logprobs, mask) == pytest.approx(math.exp(-mean))
    both = sum(bool(m and o) for m, o in zip(mask.flatten(), other.flatten(), strict=True))
    assert share_of(other, mask) == pytest.approx(both / len(inside))
    assert share_of(mask, mask) == 1.0
