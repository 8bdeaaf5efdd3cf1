"""The clipped policy-gradient loss (PPO's, as GRPO and BuPO use it), per response token.

With ratio r = exp(logprobs - old_logprobs), both of the policy that trains (BuPO Eq 9)::

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))        and where A < 0: at most -A
    dual_clip

The ratio limits the size of an update; it does not correct for who sampled the response. The
exponent is clamped to +-20 against overflow, as in the authors' code.
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
    clipped: Tensor  # tokens whose gradient the clip removed
    clipped_dual: Tensor
    kl: Tensor  # sum of k3 = r - 1 - log r >= 0: how far the policy moved from the old one, nats
    FIELDS = ("tokens", "ratio", "clipped", "clipped_dual", "kl")

    def stacked(self) -> Tensor:
        """The sums as one tensor, `[5]`, in the order of FIELDS."""
        return torch.stack([getattr(self, name) for name in self.FIELDS])


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, ClipStatistics]:
    """The weighted sum of the token losses, and how often they were clipped.

    All of shape `[response tokens]`; log-probs in nats, `weights` from `token_weights`.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = torch.maximum(plain, clipped)
    over = torch.zeros_like(per_token, dtype=torch.bool)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        over = (advantages < 0) & (per_token > bound)
        per_token = torch.where(over, bound, per_token)
    with torch.no_grad():
        statistics = ClipStatistics(
            tokens=torch.full_like(per_token, 1.0).sum(),
            ratio=ratio.sum(),
            clipped=((clipped > plain) & ~over).float().sum(),
            clipped_dual=over.float().sum(),
            kl=(torch.expm1(log_ratio) - log_ratio).sum(),  # r - 1 would cancel: r is near 1
        )
    return (per_token * weights).sum(), statistics
