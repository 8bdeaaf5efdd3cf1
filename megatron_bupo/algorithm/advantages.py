"""What a response is worth beside the other responses to its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6


def group_relative_advantages(rewards: Tensor, *, normalize_by_std: bool = True) -> Tensor:
    """GRPO's advantages: `(R - mean) / (std + 1e-6)` in each group, unbiased std (BuPO Eq 3).

    `rewards [prompts, responses_per_prompt]` -> the same shape, fp32. A group whose rewards are all
    equal teaches nothing: its advantages are 0. Without `normalize_by_std`: `R - mean`.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"need [prompts, responses_per_prompt >= 2] rewards, not {list(rewards.shape)}"
        )
    exact = rewards.double()  # in fp32, rewards close together would lose digits to their mean
    centred = exact - exact.mean(dim=1, keepdim=True)
    if normalize_by_std:
        centred /= exact.std(dim=1, keepdim=True) + STD_FLOOR
    return centred.float()


def signal_fraction(rewards: Tensor) -> float:
    """Share of groups whose rewards differ, i.e. that have a gradient."""
    return float((rewards.max(dim=1).values > rewards.min(dim=1).values).float().mean())


def token_weights(response_mask: Tensor, aggregation: str) -> Tensor:
    """How much each token's loss counts, `[responses, tokens]` fp32, over a whole minibatch.

    "token_mean": every response token alike, 1 / (response tokens of the minibatch).
    "sequence_mean": 1 / responses, shared by the tokens of a response (BuPO Eq 9). Weights come
    from the whole minibatch, so the loss does not depend on how it is cut into micro-batches or
    dealt to ranks.
    """
    mask = response_mask.to(torch.float32)
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_mean":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / mask.shape[0]
    raise ValueError(f"unknown aggregation {aggregation!r}; choose token_mean or sequence_mean")
