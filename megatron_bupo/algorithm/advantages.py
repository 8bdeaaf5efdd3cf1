"""What is a response worth beside others, and what is each of its tokens worth?

With R_i the rewards of the n responses to one prompt::

    grpo                            (R_i - mean R) / (std R + 1e-6)          arXiv 2402.03300, 4.1.2
    dr_grpo                         R_i - mean R                             arXiv 2503.20783, 3.2
    rloo                            R_i - mean of the others' R              arXiv 2402.14740
    reinforce_plus_plus             R_i, whitened                            arXiv 2501.03262
    reinforce_plus_plus_baseline    R_i - mean R, whitened                   the same
    gae                             by a critic, whitened; see `value.py`    arXiv 1506.02438

GRPO's is BuPO's Eq 3, with the unbiased std of the authors' code; RLOO's is n / (n - 1) times Dr.
GRPO's. To whiten is to subtract the mean of all response tokens of a step and to divide by their
standard deviation, as verl does: a long response counts more often than a short one.

Where a KL to the reference is taken off the reward, a response loses all of its own. With gae and
reinforce_plus_plus rewards belong to tokens: a token loses the KL from itself onwards, which makes
the latter's advantage a return, with gamma 1.

The other half of Dr. GRPO is the loss's: each response's is divided by one constant, not by its
length (`token_weights`, "constant_length").
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bupo.algorithm.value import gae

STD_FLOOR = 1e-6
VARIANCE_FLOOR = 1e-8  # verl's


def token_advantages(
    rewards: Tensor,
    learns: Tensor,
    *,
    estimator: str,
    normalize_by_std: bool = True,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> Tensor:
    """The advantages of response tokens by one of the estimators above, fp32 `[responses, tokens]`.

    `rewards [prompts, responses_per_prompt]`; `learns [responses, tokens]` bool: the tokens that
    learn, all others have 0; `kl [responses, tokens]` nats, 0 outside responses: taken off the
    rewards, times `kl_coefficient`. `normalize_by_std=False` turns grpo into dr_grpo.
    """
    if estimator == "reinforce_plus_plus":
        returns = rewards.double().reshape(-1, 1).expand(learns.shape)
        if kl is not None:
            returns = returns - kl_coefficient * kl.double().flip(1).cumsum(1).flip(1)
        return whitened(returns, learns)
    if kl is not None:
        rewards = rewards.double() - kl_coefficient * kl.double().sum(dim=1).view_as(rewards)
    if estimator == "reinforce_plus_plus_baseline":
        centred = _centred(rewards).reshape(-1, 1).expand(learns.shape)
        return whitened(centred, learns)
    if estimator == "grpo":
        worth = group_relative_advantages(rewards, normalize_by_std=normalize_by_std)
    elif estimator == "dr_grpo":
        worth = group_relative_advantages(rewards, normalize_by_std=False)
    elif estimator == "rloo":
        worth = leave_one_out_advantages(rewards)
    else:
        raise ValueError(f"unknown estimator {estimator!r}")
    return worth.reshape(-1, 1) * learns


def critic_advantages(
    rewards: Tensor,
    values: Tensor,
    learns: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    whiten: bool = True,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PPO's advantages (gae, in `value.py`) and the returns that its critic learns, fp32
    `[responses, tokens]`, 0 where nothing `learns`.

    `values [responses, tokens]` of the critic before the step's first update: entry t is what the
    rest of the response earns before token t is known. `rewards [prompts, responses_per_prompt]`
    stand at the last tokens that learn, `kl` as above is taken off token by token. `whiten`: the
    advantages, over all tokens that learn; the returns are those of the plain ones.
    """
    earned = token_rewards(rewards, learns)
    if kl is not None:
        earned -= kl_coefficient * kl.double()
    advantages, returns = gae(earned, values, learns, gamma=gamma, gae_lambda=gae_lambda)
    return whitened(advantages, learns) if whiten else advantages.float(), returns.float()


def token_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Each response's reward at its last token in `mask [responses, tokens]`, 0 elsewhere; of the
    mask's shape, float64.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return last * rewards.double().reshape(-1, 1)


def group_relative_advantages(rewards: Tensor, *, normalize_by_std: bool = True) -> Tensor:
    """GRPO's advantages: `(R - mean) / (std + 1e-6)` in each group, unbiased std (BuPO Eq 3).

    `rewards [prompts, responses_per_prompt]` -> the same shape, fp32. A group whose rewards are all
    equal teaches nothing: its advantages are 0. Without `normalize_by_std`: `R - mean`.
    """
    centred = _centred(rewards)
    if normalize_by_std:
        centred /= rewards.double().std(dim=1, keepdim=True) + STD_FLOOR
    return centred.float()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """RLOO's: each reward less the mean of its group's others; shapes as above."""
    n = rewards.shape[-1]
    return (_centred(rewards) * n / (n - 1)).float()


def _centred(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"need [prompts, responses_per_prompt >= 2] rewards, not {list(rewards.shape)}"
        )
    exact = rewards.double()  # in fp32, rewards close together would lose digits to their mean
    return exact - exact.mean(dim=1, keepdim=True)


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """`values [responses, tokens]` with mean 0 and variance 1 (unbiased) over the tokens of `mask`,
    fp32; 0 elsewhere. Values that are all equal become 0.
    """
    picked = values.double()[mask]
    if not len(picked):
        return torch.zeros(mask.shape)
    centred = picked - picked.mean()
    variance = centred.square().sum() / max(len(picked) - 1, 1)
    out = torch.zeros(mask.shape)
    out[mask] = (centred * (variance + VARIANCE_FLOOR).rsqrt()).float()
    return out


def token_weights(learns: Tensor, aggregation: str, *, longest: int | None = None) -> Tensor:
    """How much each token's loss counts, `[responses, tokens]` fp32, over a whole minibatch.

    `learns [responses, tokens]` bool: the response tokens that count at all. "token_mean": each
    alike, 1 / (such tokens of the minibatch). "sequence_mean": 1 / responses, shared by the tokens
    of a response (BuPO Eq 9). "constant_length": 1 / (responses x `longest`), the longest response
    that there can be (Dr. GRPO, arXiv 2503.20783, section 3.2). A response that does not learn is
    still one of the responses. Weights come from the whole minibatch, so the loss does not depend
    on how it is cut into micro-batches or dealt to ranks.
    """
    mask = learns.to(torch.float32)
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_mean":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / mask.shape[0]
    if aggregation == "constant_length" and longest is not None:
        return mask / (mask.shape[0] * longest)
    raise ValueError(
        f"unknown aggregation {aggregation!r}; choose token_mean, sequence_mean or, with `longest`,"
        " constant_length"
    )
