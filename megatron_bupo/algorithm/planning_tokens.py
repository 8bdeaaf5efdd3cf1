"""Which tokens plan, and which execute? A token plans where it is part of a strategic gram.

Strategic grams are the few words by which reasoning is steered, "let me check whether" (HICRA,
arXiv 2509.03646, section 2.1). A gram is found in the decoded text, whatever its case, where its
words and punctuation marks stand one after the other; the space between them may be any. So it
begins and ends at word boundaries, and it does not matter how a tokenizer cuts the words. A token
plans if any of its characters lies inside a gram that is found.

Each word of the text begins a walk down a tree of all grams: linear in the text, whatever the
number of grams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int]  # characters [start, end) of a text

# A word with its apostrophes, or one character that is neither part of a word nor space
_PIECE = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


class StrategicGrams:
    """A set of grams, ready to be looked for."""

    def __init__(self, grams: Iterable[str]) -> None:
        self._tree: dict[str, Any] = {}
        for gram in grams:
            node = self._tree
            for piece, _ in _pieces(gram):
                node = node.setdefault(piece, {})
            if node is not self._tree:
                node[""] = True  # no piece is empty: here a gram ends

    def spans(self, text: str) -> list[Span]:
        """Where grams stand in `text`, in order; they may overlap."""
        pieces = _pieces(text)
        found = []
        for first, (_, (start, _)) in enumerate(pieces):
            node, end = self._tree, 0
            for place in range(first, len(pieces)):
                piece, (_, piece_end) = pieces[place]
                if piece not in node:
                    break
                node = node[piece]
                end = piece_end if "" in node else end
            if end:
                found.append((start, end))
        return found


def _pieces(text: str) -> list[tuple[str, Span]]:
    """Words and punctuation marks, as they are compared, and where they stand."""
    return [(m[0].casefold().replace("\u2019", "'"), m.span()) for m in _PIECE.finditer(text)]


def planning_mask(text: str, tokens: Sequence[Span], grams: StrategicGrams) -> list[bool]:
    """Does each token plan? `tokens`: their characters in `text`, in order."""
    planning = [False] * len(tokens)
    first = 0
    for start, end in grams.spans(text):
        while first < len(tokens) and tokens[first][1] <= start:
            first += 1
        for i in range(first, len(tokens)):
            if tokens[i][0] >= end:
                break
            planning[i] = planning[i] or tokens[i][1] > tokens[i][0]
    return planning
