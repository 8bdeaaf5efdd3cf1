"""What will a response still earn from here on, and what did a token change about it?

A critic's value V_t is what the rest of a response is expected to earn before its token t is known.
Generalized advantage estimation (arXiv 1506.02438, Eq 16) weighs how far each token's reward and
the next value surpass it, the further ahead the less::

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}
    return  = A_t + V_t                         what the critic learns

lambda 1 takes the rewards as they came, less V_t: no bias, all their noise (Eq 18); lambda 0 trusts
the critic from the next token on (Eq 17). After a response's last token nothing is earned, and V is
0; of a response that was cut too, for it is graded as it is.

The critic's loss keeps it near its own values from before the step's first update, as PPO's authors
do in their code, and takes the worse of both::

    1/2 max((V - return)^2, (V_old + clip(V - V_old, +-clip_range) - return)^2)
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float64, all `[responses, tokens]`; 0 outside `mask`.

    `rewards` of tokens and `values` before them count where `mask` (bool) is True; what lies
    between two such tokens of a response is skipped as if it were not there.
    """
    # Down the tokens, so that each step reads one row
    r, v, on = (x.t().contiguous() for x in (rewards.double(), values.double(), mask))
    advantages = torch.zeros_like(r)
    value = advantage = r.new_zeros(r.shape[1])  # of the next token in the mask
    for t in reversed(range(len(r))):
        delta = r[t] + gamma * value - v[t]
        advantage = torch.where(on[t], delta + gamma * gae_lambda * advantage, advantage)
        value = torch.where(on[t], v[t], value)
        advantages[t] = advantage
    nothing = r.new_zeros(())
    return (
        torch.where(on, advantages, nothing).t().contiguous(),
        torch.where(on, advantages + v, nothing).t().contiguous(),
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    *,
    clip_range: float | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the token losses, and of how many tokens the clip took the gradient
    (detached).

    All of shape `[response tokens]`; `weights` from `token_weights`, `old_values` from before the
    step's first update. `clip_range=None`: half the squared error.
    """
    loss = (values - returns).square()
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    if clip_range is not None:
        near = values.clamp(old_values - clip_range, old_values + clip_range)  # else V, to the bit
        bounded = (near - returns).square()
        clipped = bounded > loss
        loss = torch.maximum(loss, bounded)
    return (loss * weights).sum() / 2, clipped.detach().sum().float()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """How much of what differs between the returns of the tokens in `mask` the values foresee: 1
    all, 0 no more than a constant would, less than 0 worse. All `[responses, tokens]`.

    Returns that are all equal leave nothing to foresee: 0.
    """
    earned = returns.double()[mask]
    missed = earned - values.double()[mask]
    if len(earned) < 2 or earned.min() == earned.max():
        return 0.0
    return float(1 - missed.var() / earned.var())
