"""Which tokens plan, and which execute? A token plans where it is part of a strategic gram.

Strategic grams are the few words by which reasoning is steered, "let me check whether" (HICRA,
arXiv 2509.03646, section 2.1). A gram is found in the decoded text where its words and punctuation
marks stand one after the other, so it begins and ends at word boundaries, and it does not matter
how a tokenizer cuts the words. Words are compared without case (Unicode's compatibility caseless
match, so that straße is STRASSE) and with one kind of apostrophe; the space between them may be
any. Where a script has no spaces, each of its characters is a word. A token plans if any of its
characters lies inside a gram that is found.

All grams are looked for at once, by an Aho-Corasick automaton over words: linear in the text,
whatever the number of grams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple
from unicodedata import normalize

import ahocorasick
import regex

Span = tuple[int, int]  # characters [start, end) of a text

_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc"), "'")
# A character of a script without spaces, a word with its apostrophes, or one character that is
# neither part of a word nor space. A combining mark belongs to its letter (not so in stdlib's re).
_PIECE = regex.compile(
    rf"{_SPACELESS}\p{{M}}*"
    rf"|[\w--{_SPACELESS}]+(?:['\u2018\u2019\uff07][\w--{_SPACELESS}]+)*"
    r"|[^\w\s\p{Cf}]",
    regex.VERSION1,
)


class Found(NamedTuple):
    """`gram` stands at the characters `[start, end)` of the text."""

    gram: str
    start: int
    end: int


class StrategicGrams:
    """A set of grams, ready to be looked for."""

    def __init__(self, grams: Iterable[str]) -> None:
        self._words: dict[str, int] = {}  # those of the grams, from 1; 0 is any other
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_ANY, ahocorasick.KEY_SEQUENCE)
        for gram in grams:
            words = words_of(gram)
            if words:
                key = tuple(self._words.setdefault(w, len(self._words) + 1) for w in words)
                self._automaton.add_word(key, (gram, len(words)))
        self._automaton.make_automaton()

    def find(self, text: str) -> list[Found]:
        """Where grams stand in `text`, also inside each other, by where they end."""
        if not self._words:  # an automaton of nothing cannot be asked
            return []
        spans = [match.span() for match in _PIECE.finditer(text)]
        known = self._words.get
        ids = tuple([known(_folded(text[start:end]), 0) for start, end in spans])
        return [
            Found(gram, spans[last - words + 1][0], spans[last][1])
            for last, (gram, words) in self._automaton.iter(ids)
        ]


def words_of(text: str) -> list[str]:
    """Words and punctuation marks of `text`, as they are compared."""
    return [_folded(piece) for piece in _PIECE.findall(text)]


def word_at(text: str, start: int) -> str | None:
    """The first word or punctuation mark of `text` from `start` on, where one ends or begins."""
    match = _PIECE.search(text, start)
    return None if match is None else _folded(match[0])


@lru_cache(maxsize=2**16)
def _folded(piece: str) -> str:
    if piece.isascii():
        return piece.lower()
    folded = normalize("NFKC", normalize("NFKC", piece).casefold())
    return folded.translate(_APOSTROPHES)


def planning_mask(text: str, tokens: Sequence[Span], grams: StrategicGrams) -> list[bool]:
    """Does each token plan? `tokens`: their characters in `text`, in order."""
    return inside(tokens, grams.find(text))


def inside(tokens: Sequence[Span], found: Sequence[Found]) -> list[bool]:
    """Is each of the `tokens` part of a gram that was `found` in their text?"""
    planning = [False] * len(tokens)
    at = 0
    for start, end in _covered(found):
        while at < len(tokens) and tokens[at][1] <= start:
            at += 1
        while at < len(tokens) and tokens[at][0] < end:
            planning[at] = tokens[at][1] > tokens[at][0]
            at += 1
    return planning


def _covered(found: Sequence[Found]) -> list[Span]:
    """The characters inside any of `found`, as spans that do not touch, in order."""
    spans: list[Span] = []
    for _, start, end in reversed(found):  # by end, the last first
        if spans and end >= spans[-1][0]:
            spans[-1] = (min(start, spans[-1][0]), spans[-1][1])
        else:
            spans.append((start, end))
    return spans[::-1]
