"""Which characters does each token stand for? Byte-level tokens may be no whole character.

Tokens are decoded a few at a time, with the one before them, until no character is left half: a
tokenizer may decode a token differently at the beginning of a text. The tokens that make up one
character all stand for the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character
_LONGEST = 8  # tokens until bytes are taken for what they are: no character


def token_texts(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of `ids`, and for each token its characters `[start, end)` in it."""
    text, spans = "", []
    before = begin = 0  # tokens [before, begin) have been decoded, and are context
    for end in range(1, len(ids) + 1):
        context, window = decode(ids[before:begin]), decode(ids[before:end])
        new = window[len(context) :]
        unfinished = new.endswith(_HALF) and end - begin < _LONGEST
        if (unfinished or len(window) < len(context)) and end < len(ids):
            continue
        spans += [(len(text), len(text) + len(new))] * (end - begin)
        text += new
        before, begin = begin, end
    return text, spans
