"""Which word n-grams do many solutions share, each using them sparingly? HICRA, arXiv 2509.03646,
section 2.1, apart from the embeddings.

An n-gram that many solutions have, has beginnings and ends that as many have. So n-grams are grown
a word at a time from those that are frequent, and a frequent (n-1)-gram and a word are one number
of 64 bits: exact counts, a sort per n, and no text until the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bupo.algorithm.planning_tokens import words_of

Numbers = NDArray[np.int64]
BREAK = -1  # in place of a word: no n-gram goes across


@dataclass(frozen=True)
class Words:
    """Solutions as numbers, one after the other."""

    words: Numbers  # [words] numbers of `vocabulary`, or BREAK
    solutions: Numbers  # [words] which solution each is in
    vocabulary: list[str]


@dataclass(frozen=True)
class Grams:
    """Frequent n-grams, the most frequent first, and the solutions that they stand in."""

    texts: list[str]  # [grams]
    solutions: Numbers  # [grams] how many have it
    counts: Numbers  # [grams] how often it stands in all of them
    pairs: Numbers  # [pairs, 2]: (gram, solution that has it)

    def most_frequent(self, limit: int) -> Grams:
        """The first `limit` of them."""
        pairs = self.pairs[self.pairs[:, 0] < limit]
        return Grams(self.texts[:limit], self.solutions[:limit], self.counts[:limit], pairs)


def read_words(texts: Iterable[str]) -> Words:
    """The words of `texts`. Punctuation, formulas and what has a digit in it break n-grams: they
    execute, and no two solutions share them.
    """
    numbers: dict[str, int] = {}
    words: list[int] = []
    solutions: list[int] = []
    for solution, text in enumerate(texts):
        for word in [*words_of(text), ""]:
            letters = word.replace("'", "").isalpha()
            words.append(numbers.setdefault(word, len(numbers)) if letters else BREAK)
        solutions += [solution] * (len(words) - len(solutions))
    return Words(np.array(words, np.int64), np.array(solutions, np.int64), list(numbers))


def frequent_grams(
    corpus: Words,
    *,
    shortest: int = 3,
    longest: int = 5,
    min_solutions: int,
    max_per_solution: float,
) -> Grams:
    """The n-grams of `shortest` to `longest` words that at least `min_solutions` solutions have,
    each at most `max_per_solution` times on average.
    """
    texts: list[str] = []
    kept: list[tuple[Numbers, Numbers, Numbers]] = []  # solutions, counts, pairs
    grams = corpus.words
    for n in range(1, longest + 1):
        if n > 1:
            grams = _longer(grams, corpus.words[n - 1 :], len(corpus.vocabulary))
        at = np.flatnonzero(grams != BREAK)
        if not len(at):
            break
        _, first, names = np.unique(grams[at], return_index=True, return_inverse=True)
        pairs = _pairs(names, corpus.solutions[at])
        solutions = np.bincount(pairs[0], minlength=len(first))
        frequent = solutions >= min_solutions
        grams = np.full_like(grams, BREAK)
        grams[at] = np.where(frequent[names], names, BREAK)
        if n >= shortest:
            counts = np.bincount(names, minlength=len(first))
            chosen = frequent & (counts <= max_per_solution * solutions)
            place = np.cumsum(chosen) - 1 + len(texts)
            mine = chosen[pairs[0]]
            kept.append(
                (
                    solutions[chosen],
                    counts[chosen],
                    np.stack([place[pairs[0][mine]], pairs[1][mine]], axis=1),
                )
            )
            begins = at[first[chosen]]
            texts += [
                " ".join(corpus.vocabulary[w] for w in corpus.words[b : b + n]) for b in begins
            ]
    return _sorted(texts, kept)


def _longer(grams: Numbers, last: Numbers, words: int) -> Numbers:
    """Each place's n-gram from the (n-1)-grams there and at the next place, both frequent, and the
    `last` word; else BREAK.
    """
    whole = (grams[:-1] != BREAK) & (grams[1:] != BREAK)
    return np.where(whole, grams[:-1] * words + last, BREAK)


def _pairs(first: Numbers, second: Numbers) -> Numbers:
    """The different pairs of numbers from 0 up, in order, `[2, pairs]`."""
    base = int(second.max(initial=0)) + 1
    return np.stack(np.divmod(np.unique(first * base + second), base))


def _sorted(texts: list[str], kept: list[tuple[Numbers, Numbers, Numbers]]) -> Grams:
    if not texts:
        nothing = np.zeros(0, np.int64)
        return Grams([], nothing, nothing, nothing.reshape(0, 2))
    solutions, counts, pairs = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = np.lexsort((np.array(texts), -solutions))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    pairs = np.stack([place[pairs[:, 0]], pairs[:, 1]], axis=1)
    return Grams([texts[i] for i in order], solutions[order], counts[order], pairs)


@dataclass(frozen=True)
class Mined:
    """The grams of the chosen clusters, cluster by cluster, the most frequent first."""

    grams: Grams
    clusters: Numbers  # [grams]
    chosen: Numbers  # [clusters], in order
    frequencies: Numbers  # [clusters], solutions that each stands in

    def members(self, cluster: int) -> Numbers:
        """The grams of `cluster`, the most frequent first."""
        return np.flatnonzero(self.clusters == cluster)


def choose(grams: Grams, clusters: Numbers, *, share: float) -> Mined:
    """The `share` of the clusters that stand in most solutions, at least one. `clusters [grams]`:
    from 0, or -1 for grams in none.
    """
    frequencies = cluster_frequencies(grams, clusters)
    order = np.argsort(-frequencies, kind="stable")
    chosen = order[: max(1, int(np.ceil(share * len(order))))]
    return Mined(grams, clusters, chosen, frequencies)


def cluster_frequencies(grams: Grams, clusters: Numbers) -> Numbers:
    """In how many solutions any n-gram of each cluster stands, `[clusters]`."""
    of = clusters[grams.pairs[:, 0]]
    pairs = _pairs(of[of >= 0], grams.pairs[of >= 0, 1])
    return np.bincount(pairs[0], minlength=int(clusters.max(initial=-1)) + 1)
