"""How far is the policy that trains from the reference, judged by the tokens that were sampled?

With r = p_ref / p at a token, three estimators of KL(p || p_ref) for tokens drawn from p (Schulman,
"Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html)::

    k1 = -log r             unbiased; of either sign, noisy
    k2 = (log r)^2 / 2      biased; never negative, steady
    k3 = r - 1 - log r      unbiased; never negative, steady

A good value is not yet a good gradient. Part of the loss, they pull along::

    d k1 = d log p              on average zero: it restrains nothing
    d k2 = -log r d log p       on average the gradient of KL(p || p_ref)
    d k3 = (1 - r) d log p      on average the gradient of KL(p_ref || p)

Taken off the reward, it is the policy gradient that differentiates, and k1 gives the gradient of
the whole response's KL(p || p_ref). k2 and k3 leave out how they themselves depend on p: they
punish a token for being off in either direction, so that one already too rare gets rarer still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bupo.algorithm.policy_loss import EXPONENT_LIMIT


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """KL to the reference token by token, nats; `logprobs` and `ref_logprobs` of one shape.

    Zero where both are, i.e. outside responses. The exponent of k3 is limited as the ratio's is.
    """
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        log_r = log_r.clamp(max=EXPONENT_LIMIT)
        return torch.expm1(log_r) - log_r
    raise ValueError(f"unknown estimator {estimator!r}; choose k1, k2 or k3")
