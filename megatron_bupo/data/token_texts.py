"""Which characters does each token stand for? Byte-level tokens may be no whole character.

Most tokens mean the same text wherever they stand, so each is decoded once and remembered. The
others, parts of a character, are decoded a few at a time, with the one before them, until no
character is left half; the tokens that make up one character all stand for the whole of it. What
comes of it has to be the text that the tokenizer makes of all tokens together. Where it is not, for
there are tokenizers whose words depend on their neighbours, all tokens are decoded a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise

Decode = Callable[[Sequence[int]], str]  # ids, special tokens too
Span = tuple[int, int]  # characters [start, end)

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character
_LONGEST = 8  # tokens until bytes are taken for what they are: no character


class TokenTexts:
    """The texts of one tokenizer's tokens, remembered."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, str | None] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, list[Span]]:
        """The text of `ids`, and for each token its characters `[start, end)` in it."""
        for token in set(ids).difference(self._texts):
            self._texts[token] = self._text_of(token)
        text, spans = "", []
        for whole, run in groupby(ids, lambda token: self._texts[token] is not None):
            more, inside = (self._whole if whole else self._halves)(list(run), first=not text)
            spans += [(start + len(text), end + len(text)) for start, end in inside]
            text += more
        if text == self._decode(ids):
            return text, spans
        return token_texts(ids, self._decode)

    def _text_of(self, token: int) -> str | None:
        """What `token` adds to a text that it does not begin; None: no whole characters."""
        alone, twice = self._decode([token]), self._decode([token, token])
        return None if _HALF in twice else twice[len(alone) :]

    def _whole(self, run: Sequence[int], *, first: bool) -> tuple[str, list[Span]]:
        texts = [self._texts[token] or "" for token in run]
        if first:
            texts[0] = self._decode(run[:1])  # it may lose the space that it begins with
        return "".join(texts), list(pairwise(accumulate(map(len, texts), initial=0)))

    def _halves(self, run: Sequence[int], *, first: bool) -> tuple[str, list[Span]]:  # noqa: ARG002
        return token_texts(run, self._decode)


def token_texts(ids: Sequence[int], decode: Decode) -> tuple[str, list[Span]]:
    """As `TokenTexts`, all of `ids` decoded a few at a time."""
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
