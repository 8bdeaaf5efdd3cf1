"""Which characters does each token stand for? Byte-level tokens may be no whole character.

Tokens are decoded a few at a time, with those before them, until no character is left half: for
there are tokenizers whose words depend on their neighbours. The tokens that make up one character
each stand for the whole of it, and for the other characters that they have a part in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

Decode = Callable[[Sequence[int]], str]  # ids, special tokens too
Span = tuple[int, int]  # characters [start, end)

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character
_LONGEST = 8  # tokens until bytes are taken for what they are: no character


def decoder_of(folder: Path) -> Decode:
    """What makes text of ids by the tokenizer.json in `folder`, whose library raises bare
    Exceptions.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return partial(tokenizer.decode, skip_special_tokens=False)


def token_texts(ids: Sequence[int], decode: Decode) -> tuple[str, list[Span]]:
    """The text of `ids`, and for each token its characters `[start, end)` in it."""
    text, spans = "", []
    before = begin = 0  # tokens [before, begin) have been decoded, and are context
    grown: list[str] = []  # what the tokens [begin, ...) came to, one more at a time
    for end in range(1, len(ids) + 1):
        context, window = decode(ids[before:begin]), decode(ids[before:end])
        new = window[len(context) :]
        grown.append(new)
        unfinished = new.endswith(_HALF) and end - begin < _LONGEST
        if (unfinished or len(window) < len(context)) and end < len(ids):
            continue
        spans += [(len(text) + start, len(text) + stop) for start, stop in _shares(grown)]
        text += new
        before, begin, grown = begin, end, []
    return text, spans


def pieces(text: str, spans: Sequence[Span]) -> tuple[str, ...]:
    """`text` cut into the tokens that `token_texts` found; of those that make up one character,
    the first has it.
    """
    starts = [0, *(end for _, end in spans)]
    return tuple(
        text[max(start, before) : end] for (start, end), before in zip(spans, starts, strict=False)
    )


def _shares(grown: Sequence[str]) -> list[Span]:
    """The characters of the last of `grown` that each token has a part in."""
    final, whole, shares = grown[-1], 0, []
    for text in grown[:-1]:
        start = whole
        whole = len(
            list(takewhile(lambda pair: pair[0] == pair[1], zip(text, final, strict=False)))
        )
        stop = max(start + 1, whole + (whole < len(text)))  # the half one counts
        shares.append((start, min(stop, len(final))))
    return [*shares, (whole, len(final))]
