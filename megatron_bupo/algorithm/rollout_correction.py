"""What does a token count that the learner did not sample itself? As much more or less as it is
likelier or less likely there, up to a cap.

A rollout engine computes in other kernels and perhaps in another precision than the trainer, and
where rollouts are generated ahead its weights are older. So each token's loss is weighted by the
truncated importance weight (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training", 2025; there the cap is 2)::

    w = min(p_old / p_sampler, cap)

Both are the full policy, one with the weights before the step's first update, one as it sampled.
That is the first factor of p / p_sampler = (p_old / p_sampler) (p / p_old); the second is the ratio
that the loss clips. Uncut weights would be unbiased token by token, and a few of them would be the
whole gradient. Where the learner is an internal layer policy no such weight is defined: the sampler
is another policy by design, and their quotient has nothing to do with rounding or age.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float
) -> tuple[Tensor, Tensor]:
    """Weights of tokens, and which of them the cap has cut; all `[response tokens]`, log-probs in
    nats. Weights carry no gradient.
    """
    with torch.no_grad():
        weights = (old_logprobs - rollout_logprobs).exp()
        return weights.clamp(max=cap), weights > cap
