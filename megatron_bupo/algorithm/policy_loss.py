"""What does a token cost the policy, given what it is worth?

With the ratio r = exp(logprobs - old_logprobs), both of the policy that trains (BuPO Eq 9), and
clip(r) between 1 - clip_low and 1 + clip_high::

    clipped      max(-A r, -A clip(r)), and where A < 0 at most -A dual_clip
                 PPO (arXiv 1707.06347, Eq 7), as GRPO and BuPO use it; the bound: 1912.09729
    gspo         the same with s, the geometric mean of r over the response: it is clipped whole
                                                           arXiv 2507.18071, Eq 5 and 7
    cispo        -sg(clip(r)) A log p: no token is left out, its weight is what is clipped
                                                           arXiv 2506.13585, Eq 4 and 5
    unclipped    -A r, the policy gradient                 sg: no gradient flows through

The ratio limits the size of an update; it does not correct for who sampled the response. Its
exponent is clamped to +-20 against overflow, as in the authors' code. clip_low < clip_high is
clip-higher (DAPO, arXiv 2503.14476, section 3.1); clip_low = 1 is no lower bound. CISPO's authors
have none; GSPO's have clip_low 3e-4 and clip_high 4e-4, for a mean moves far less than a token.

GSPO's gradient reaches the tokens as in its Eq 14: each has the value of s and the slope of its own
log-prob. Where a response's tokens have one advantage that is the gradient of s itself, for each
aggregation; so tokens may also have advantages of their own, and lie on different ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT_LIMIT = 20.0


@dataclass(frozen=True)
class ClipStatistics:
    """Sums over response tokens, detached; divide by `tokens` for means."""

    tokens: Tensor
    ratio: Tensor
    clipped: Tensor  # tokens whose gradient the clip removed; with cispo: whose weight it cut
    clipped_dual: Tensor
    kl: Tensor  # sum of k3 = r - 1 - log r >= 0: how far the policy moved from the old one, nats
    FIELDS = ("tokens", "ratio", "clipped", "clipped_dual", "kl")

    def stacked(self) -> Tensor:
        """The sums as one tensor, `[5]`, in the order of FIELDS."""
        return torch.stack([getattr(self, name) for name in self.FIELDS])


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    kind: str = "clipped",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    sequence_log_ratios: Tensor | None = None,
) -> tuple[Tensor, ClipStatistics]:
    """The weighted sum of the token losses, and how often they were clipped.

    All of shape `[response tokens]`; log-probs in nats, `weights` from `token_weights`. `kind` is
    one of the above; gspo needs `sequence_log_ratios`: for each token the mean of logprobs -
    old_logprobs over its whole response.
    """
    token_log_ratio = log_ratio = logprobs - old_logprobs
    if kind == "gspo":
        assert sequence_log_ratios is not None, "gspo's ratio is that of whole responses"
        log_ratio = sequence_log_ratios.detach() + (logprobs - logprobs.detach())
    ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    low, high = 1 - clip_low, 1 + clip_high
    over = torch.zeros_like(ratio, dtype=torch.bool)
    if kind == "unclipped":
        per_token, cut = -advantages * ratio, over
    elif kind == "cispo":
        per_token = -ratio.detach().clamp(low, high) * advantages * logprobs
        cut = (ratio < low) | (ratio > high)
    elif kind in {"clipped", "gspo"}:
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(low, high)
        per_token = torch.maximum(plain, clipped)
        if dual_clip is not None:
            bound = -advantages * dual_clip
            over = (advantages < 0) & (per_token > bound)
            per_token = torch.where(over, bound, per_token)
        cut = (clipped > plain) & ~over
    else:
        raise ValueError(f"unknown loss {kind!r}; choose clipped, gspo, cispo or unclipped")
    with torch.no_grad():
        moved = token_log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
        statistics = ClipStatistics(
            tokens=torch.full_like(per_token, 1.0).sum(),
            ratio=ratio.sum(),
            clipped=cut.float().sum(),
            clipped_dual=over.float().sum(),
            kl=(torch.expm1(moved) - moved).sum(),  # r - 1 would cancel: r is near 1
        )
    return (per_token * weights).sum(), statistics
