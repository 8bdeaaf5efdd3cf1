"""How much more is a planning token worth? HICRA's advantages, and masks to compare it with.

With A a token's advantage, on planning tokens and there alone (arXiv 2509.03646, section 3)::

    paper     A + alpha |A|       a success is credited more, a failure is blamed less
    amplify   A (1 + alpha)       a success is credited more, a failure is blamed more

At alpha 0.2 both make 1.2 of an advantage of 1; of -1 the paper's formula makes -0.8 and the other
one -1.2. The paper's makes planning likelier on the whole: it adds alpha |A| wherever planning
tokens are. The other one is what some descriptions of HICRA say; it keeps the sum of a group's
advantages at 0 where its responses plan alike.

HICRA is an edit of the advantages, so it does not matter to it which advantage, loss, policy or
layout it meets; ratio and clipping are untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planning_advantages(
    advantages: Tensor, planning: Tensor, *, alpha: float = 0.2, form: str = "paper"
) -> Tensor:
    """`advantages` with more weight on the tokens where `planning` (bool) is True; all
    `[responses, tokens]`.
    """
    if form not in {"paper", "amplify"}:
        raise ValueError(f"unknown form {form!r}; choose paper or amplify")
    more = advantages.abs() if form == "paper" else advantages
    return advantages + alpha * more * planning


def displaced(planning: Tensor, response_mask: Tensor, *, seed: int) -> Tensor:
    """A placebo: each response's mask turned round by a random number of tokens.

    As many tokens in a response, in runs as long, but not those that plan. Bool
    `[responses, tokens]`; equal seeds displace alike.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = torch.zeros_like(planning)
    for i, response in enumerate(response_mask):
        tokens = int(response.sum())
        by = int(torch.randint(1, max(tokens, 2), (1,), generator=generator))
        moved[i, response] = planning[i, response].roll(by)
    return moved


def most_uncertain(entropies: Tensor, response_mask: Tensor, *, share: float) -> Tensor:
    """The `share` of all response tokens whose `entropies` (nats) are highest, bool
    `[responses, tokens]`.
    """
    values = entropies[response_mask]
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(round(share * len(values))).indices] = True
    mask = torch.zeros_like(response_mask)
    mask[response_mask] = chosen
    return mask
