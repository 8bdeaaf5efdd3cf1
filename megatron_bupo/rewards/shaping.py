r"""Terms beside correctness: is the response in form, and how long is it?

format      1 where the response ends in its only `\boxed{...}`, with nothing after it but white
            space, punctuation and the closing of the formula; `style: think` wants
            `<think>...</think><answer>...</answer>` and nothing else, each tag once, as
            DeepSeek-R1's format reward (arXiv 2501.12948, section 2.2.2). Else 0.
length      -`per_token` |tokens - `target_tokens`|: L1-Exact's penalty, with its default of 0.0003
            (arXiv 2503.04697, equation 1), at most -`most`.
overlong    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to
            `max_response_tokens` - `cache_tokens` tokens, then down in a straight line to -1 at
            `max_response_tokens`, which is the rollout's own unless given.
repetition  minus the share of the response's `words`-grams that have occurred in it before, after
            the n-gram penalty of arXiv 2502.03373 (appendix): 0 is no repetition, -1 nothing else.

Tokens are response tokens with the stop token. A mean over a group is not taken here: advantages do
that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_bupo.rewards.boxes import closing_brace

_BOX = re.compile(r"\\boxed\s*\{")
_AFTER_BOX = re.compile(r"(?:\\?[\s.$,;!\])}]|\\end\{[a-z]+\*?\}|\*)*")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_(response: str, *, style: str = "boxed") -> float:
    """1.0 where the response is in form, else 0.0; `style` is boxed or think."""
    if style == "think":
        text = response.strip()
        places = [text.find(tag) for tag in _TAGS]
        gap = text[places[1] + len(_TAGS[1]) : places[2]]
        return float(
            all(text.count(tag) == 1 for tag in _TAGS)
            and places == sorted(places)
            and text.startswith(_TAGS[0])
            and text.endswith(_TAGS[3])
            and not gap.strip()
        )
    if style != "boxed":
        raise ValueError(f"style={style} is neither boxed nor think")
    boxes = list(_BOX.finditer(response))
    if len(boxes) != 1:
        return 0.0
    end = closing_brace(response, boxes[0].end() - 1)
    return float(end is not None and bool(_AFTER_BOX.fullmatch(response, end + 1)))


def length(
    response_ids: Sequence[int],
    *,
    target_tokens: int,
    per_token: float = 0.0003,
    most: float = 1.0,
) -> float:
    """Between -`most` and 0."""
    if target_tokens < 0 or per_token < 0 or most < 0:
        raise ValueError("target_tokens, per_token and most must be at least 0")
    return -min(per_token * abs(len(response_ids) - target_tokens), most)


def overlong(response_ids: Sequence[int], *, cache_tokens: int, max_response_tokens: int) -> float:
    """Between -1 and 0."""
    if not 0 < cache_tokens <= max_response_tokens:
        raise ValueError(f"cache_tokens must be between 1 and {max_response_tokens=}")
    over = len(response_ids) - (max_response_tokens - cache_tokens)
    return -min(max(over / cache_tokens, 0.0), 1.0)


def repetition(response: str, *, words: int = 20) -> float:
    """Between -1 and 0."""
    if words < 1:
        raise ValueError("words must be at least 1")
    parts = response.split()
    grams = [tuple(parts[i : i + words]) for i in range(len(parts) - words + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0
