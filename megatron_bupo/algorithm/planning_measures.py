"""What do responses plan, and how sure is the policy where they do? HICRA's instruments.

Frequencies are turned into entropies by the plug-in estimator, -sum f log f, in nats. It ends at
ln(number of different things that there are) and is too low while counts are small, by about
(different things seen - 1) / (2 x things counted). So compare steps that found about equally many
grams.

- Semantic entropy (arXiv 2509.03646): of the distribution of the strategic grams, or of their
  clusters, over all places where one stands. A gram inside a longer one that stands there is part
  of that one and does not count. It ends at ln(number of grams).
- What follows: of the word (or punctuation mark) after a gram, given the gram, averaged by the
  grams' frequencies; too low by about (different pairs - different grams) / (2 x grams counted).
  One word, because of more words the counts are too small: in 256, 512 and 1,024 real solutions
  it is 1.04, 1.42 and 1.68 nats, of three words 1.55, 2.12 and 2.61.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_bupo.algorithm.planning_tokens import Found, word_at


class Use(NamedTuple):
    """A gram at one place, and the word after it; None: it is the last."""

    gram: str
    next_word: str | None


@dataclass(frozen=True)
class Planning:
    """What the responses of a step plan."""

    tokens: Tensor  # bool [responses, tokens]: is each part of a gram?
    uses: Sequence[Use]


def uses(text: str, found: Iterable[Found]) -> list[Use]:
    """The grams `found` in `text` that are not inside a longer one, in order."""
    outermost: list[Found] = []
    for gram in sorted(found, key=lambda found: (found.start, -found.end)):
        if not outermost or gram.end > outermost[-1].end:
            outermost.append(gram)
    return [Use(gram, word_at(text, end)) for gram, _, end in outermost]


def frequency_entropy(things: Iterable[Hashable]) -> float:
    """Entropy of the frequencies of `things`, nats."""
    counts = Counter(things).values()
    total = sum(counts)
    return math.fsum(count / total * math.log(total / count) for count in counts)


def following_entropy(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Entropy of the second of `pairs` given the first, nats; at least 0."""
    given = frequency_entropy(first for first, _ in pairs)
    return max(frequency_entropy(pairs) - given, 0.0)


def perplexity(logprobs: Tensor, mask: Tensor) -> float:
    """exp of the mean negative log-prob (nats) of the tokens where `mask` is True."""
    return float((-logprobs[mask].double().mean()).exp())


def share_of(tokens: Tensor, among: Tensor) -> float:
    """The share of the tokens `among` that are `tokens` too; both bool, `among` not empty."""
    return int((tokens & among).sum()) / int(among.sum())
