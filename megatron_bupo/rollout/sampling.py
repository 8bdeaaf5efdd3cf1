"""How is a token drawn from logits? By inverting the cumulative distribution at a uniform number.

The uniform numbers of a response are a function of the seed, the prompt and the response's place in
its group, so a response depends neither on its batch nor on how many ranks share the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


class Draw(NamedTuple):
    """One token per row, all `[rows]`; log-probs and entropies in nats, fp32."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def uniforms(*, seed: int, prompt: int, response: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for response `response` of prompt `prompt`, `[count]` fp64.

    Philox is counter-based: every (seed, prompt) key and response counter has a stream of its own,
    and a longer stream begins with the shorter one.
    """
    key = np.array([seed % 2**64, prompt], dtype=np.uint64)  # of a list, numpy may make floats
    bits = np.random.Philox(key=key, counter=[0, 0, 0, response])
    return np.random.Generator(bits).random(count)


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float = 1.0) -> Draw:
    """Draw a token per row of `logits [rows, vocab]` with `uniform [rows]`.

    Log-probs and entropies are those of softmax(logits / temperature), before `top_p` cuts its
    tail. Temperature 0 takes the likeliest token and reports it under temperature 1, as SGLang
    does.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    probs = logprobs.exp()
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        nucleus = probs if top_p == 1 else _cut_tail(probs, top_p)
        tokens = _invert(nucleus, uniform)
    return Draw(
        tokens=tokens,
        logprobs=logprobs.gather(-1, tokens[:, None]).squeeze(-1),
        entropies=torch.special.entr(probs).sum(-1),
    )


def _cut_tail(probs: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens up to and including the one that brings them to `top_p`."""
    ordered, places = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.double().cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, places, ordered.where(mass_before < top_p, 0))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token whose slice of the cumulative `weights [rows, vocab]` holds `uniform [rows]`."""
    cumulative = weights.double().cumsum(-1)  # fp32 loses the tail of a large vocabulary
    total = cumulative[:, -1:]
    # The largest uniform times the total may round up to the total, which belongs to no token.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
