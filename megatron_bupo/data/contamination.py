"""Does training ask what evaluation asks?

A training question repeats an evaluation question if

- both have the same normal form: Unicode's NFKC, lower case, without dollar signs, what LaTeX has
  for spacing and size, and white space that does not keep two words or numbers apart; or
- it holds at least half of the evaluation question's 13-grams: runs of 13 words, a word being
  letters and digits. The evaluation question counts, not the training question, so that neither an
  instruction around it nor the phrases that competitions end with ("where m and n are relatively
  prime positive integers. Find m+n.") decide. What has fewer words than 13 is only compared whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

WORDS = 13  # in a gram
SHARE = 0.5  # of the evaluation question's grams

T = TypeVar("T")

_SPACING = re.compile(
    r"\$|\\(?:[,;:! ()\[\]]|(?:left|right|big|bigg|displaystyle|quad|qquad|limits)(?![a-z]))|~"
)
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_IDLE = re.compile(r"\s+(?!\w)|(?<!\w)\s+")
_WORD = re.compile(r"[^\W_]+")


def normal_form(text: str) -> str:
    """`text` without what does not matter to what is asked."""
    return " ".join(_IDLE.sub("", _without_spacing(text)).split())


def words(text: str) -> list[str]:
    """The words of `text`, in lower case."""
    return _WORD.findall(_without_spacing(text))


def _without_spacing(text: str) -> str:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = text.lower() if text.isascii() else text.casefold()
    return (
        _FRACTION.sub(r"\\frac", _SPACING.sub(" ", text)) if "\\" in text or "$" in text else text
    )


def _grams(found: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(found[start:] for start in range(WORDS)), strict=False)


class Asked(Generic[T]):
    """The questions of an evaluation, to look others up in."""

    def __init__(self, questions: Iterable[tuple[str, T]]) -> None:
        """`questions`: what is asked, and whatever stands for it in an answer of `match`."""
        self._by_form: dict[str, T] = {}
        self._by_gram: Mapping[Hashable, list[int]]
        self._by_gram = defaultdict(list)
        self._long: list[tuple[T, int]] = []  # and the number of its grams
        for text, what in questions:
            if form := normal_form(text):
                self._by_form.setdefault(form, what)
            if grams := set(_grams(words(text))):
                for gram in grams:
                    self._by_gram[gram].append(len(self._long))
                self._long.append((what, len(grams)))

    def match(self, text: str, form: str | None = None) -> T | None:
        """The question that `text` repeats, if any; `form`: its normal form, if known."""
        form = normal_form(text) if form is None else form
        if form in self._by_form:
            return self._by_form[form]
        found = words(text)
        if self._by_gram.keys().isdisjoint(_grams(found)):
            return None
        shared = Counter(i for gram in set(_grams(found)) for i in self._by_gram.get(gram, ()))
        best = max(shared, key=lambda i: shared[i] / self._long[i][1])
        what, count = self._long[best]
        return what if shared[best] >= SHARE * count else None
