from __future__ import annotations

import random
import re

import pytest

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask

GRAMS = ["let me check", "wait, let me", "we can", "me", "don\u2019t we can", "a b a b"]


def words(text: str) -> list[str]:
    return [w.lower() for w in re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.replace("\u2019", "'"))]


def quadratic(text: str, tokens: list[tuple[int, int]], grams: list[str]) -> list[bool]:
    """Try every piece of the text that begins and ends with a word of it."""
    planning = set()
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            inside, cut = text[start:end], words(text[:start]) + words(text[start:end])
            if (
                inside.strip() == inside
                and words(inside) in [words(gram) for gram in grams]
                and cut + words(text[end:]) == words(text)
            ):
                planning |= set(range(start, end))
    return [any(place in planning for place in range(*token)) for token in tokens]


@pytest.mark.parametrize("seed", range(20))
def test_planning_tokens_are_those_of_a_search_through_all_substrings(seed: int):
    rng = random.Random(seed)
    parts = [
        "let",
        "Let",
        "me",
        "ME",
        "check",
        "wait",
        ",",
        "we",
        "can",
        "don't",
        "don\u2019t",
        "a",
        "b",
    ]
    gaps = ["", " ", " ", "  ", "\n", ". "]
    text = "".join(rng.choice(parts) + rng.choice(gaps) for _ in range(18))
    cuts = sorted(rng.choices(range(len(text) + 1), k=12))  # some tokens have no characters
    tokens = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
    assert planning_mask(text, tokens, StrategicGrams(GRAMS)) == quadratic(text, tokens, GRAMS)


def test_a_gram_is_found_whatever_its_case_and_the_space_in_it_and_not_inside_a_word():
    text = "Let  me\nCHECK. outlet me check, let me checkers"
    assert StrategicGrams(["let me check"]).spans(text) == [(0, 13)]


def test_the_space_inside_a_gram_plans_and_the_space_before_it_does_not():
    text, tokens = " let me go", [(0, 4), (4, 5), (5, 7), (7, 7), (7, 8), (8, 10)]
    mask = planning_mask(text, tokens, StrategicGrams(["let me"]))
    assert mask == [True, True, True, False, False, False]


def test_no_grams_and_empty_grams_are_found_nowhere():
    assert StrategicGrams([]).spans("let me") == StrategicGrams(["", "  "]).spans("let me") == []
