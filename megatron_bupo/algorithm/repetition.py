"""How much of a response has been said before in it?

A model that collapses says the same over and over, which no average of log-probs shows: what is
repeated becomes ever more probable. Of the n-grams of a text, as many as there are distinct ones
are new::

    repeated fraction = 1 - distinct n-grams / n-grams
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTH = 4  # tokens of an n-gram


def repeated_fraction(token_ids: Sequence[int], *, n: int = LENGTH) -> float:
    """Of the n-grams of `token_ids`, the fraction that stood there before; 0 of fewer than `n`
    tokens, which have none.
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
