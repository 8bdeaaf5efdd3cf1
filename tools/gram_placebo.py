"""Which n-grams stand in as many solutions as strategic grams do, but were chosen by lot? They are
the placebo of HICRA's ablation, its random n-grams.

For each strategic gram one of as many words is drawn among those whose numbers of solutions are
nearest to its own. It is no part of a strategic gram and has none as a part, so what it marks is
other text, of the same kind and about as much of it.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, words_of
from megatron_bupo.errors import InputError
from tools.gram_mining import Grams

NEAREST = 20  # that a placebo is drawn among


def solutions_with(grams: Sequence[str], texts: Sequence[str]) -> list[int]:
    """In how many of `texts` each of `grams` stands."""
    have = dict.fromkeys(grams, 0)
    finder = StrategicGrams(grams)
    for text in texts:
        for gram in {found.gram for found in finder.find(text)}:
            have[gram] += 1
    return [have[gram] for gram in grams]


def placebos(
    strategic: Sequence[str], solutions: Sequence[int], grams: Grams, *, seed: int
) -> list[int]:
    """For each of the `strategic` grams, which stand in so many `solutions`, the number of one of
    `grams`; each is drawn once.
    """
    rng = random.Random(seed)
    free: dict[
        int, list[int]
    ] = {}  # by words: the numbers of grams, those in fewest solutions first
    for gram in reversed(_others(strategic, grams.texts)):
        free.setdefault(len(words_of(grams.texts[gram])), []).append(gram)
    drawn = {}
    for place in rng.sample(range(len(strategic)), len(strategic)):
        words = len(words_of(strategic[place]))
        choice = free.get(words, [])
        if not choice:
            raise InputError(
                strategic[place],
                f"no n-gram of {words} words is left to stand for it",
                "give more solutions, or lower --min-solutions",
            )
        at = bisect_left(choice, solutions[place], key=lambda gram: int(grams.solutions[gram]))
        first = max(0, min(at - NEAREST // 2, len(choice) - NEAREST))
        drawn[place] = choice.pop(rng.randrange(first, min(first + NEAREST, len(choice))))
    return [drawn[place] for place in range(len(strategic))]


def _others(strategic: Sequence[str], grams: Sequence[str]) -> list[int]:
    """The numbers of those of `grams` that neither have a strategic gram nor are part of one."""
    finder, parts = StrategicGrams(strategic), set()
    for gram in strategic:
        words = words_of(gram)
        ends = range(1, len(words) + 1)
        parts |= {tuple(words[start:end]) for end in ends for start in range(end)}
    return [
        number
        for number, gram in enumerate(grams)
        if tuple(words_of(gram)) not in parts and not finder.find(gram)
    ]
