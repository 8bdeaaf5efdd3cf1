"""The knobs between rewards and a loss, as a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to a loss. Defaults: the GRPO of the BuPO paper's runs (Table 8, scripts)."""

    # grpo | dr_grpo | rloo | reinforce_plus_plus | reinforce_plus_plus_baseline | gae (PPO, with a
    # critic: see `critic`); formulas in algorithm/advantages.py
    advantage: str = "grpo"
    # of grpo: (R - mean) / (std + 1e-6), unbiased; false: R - mean. Of gae: whitened over the
    # tokens of a step; false: as they are
    normalize_by_std: bool = True
    gamma: float = 1.0  # of gae: what a reward is worth one token earlier
    gae_lambda: float = 1.0  # 0: one step ahead, the rest by the critic; 1: whole returns
    # clipped | gspo | cispo | unclipped; formulas in algorithm/policy_loss.py
    loss: str = "clipped"
    clip_low: float = 0.2  # ratios are clipped below 1 - clip_low; 1: never
    clip_high: float = 0.2  # and above 1 + clip_high
    dual_clip: float | None = 10.0  # bound on the ratio's weight where A < 0; None: off
    # token_mean | sequence_mean (the paper's equation) | constant_length (1 over responses x
    # rollout.max_response_tokens) | auto: the last with dr_grpo, sequence_mean with gspo, else the
    # first
    loss_aggregation: str = "auto"
    minibatches: int = 4  # optimizer updates per step
    kl_coefficient: float = 0.0  # of the KL to the initial model under the same policy; 0: none
    kl_estimator: str = "k3"  # k1 | k2 | k3
    kl_in: str = "loss"  # loss | reward
    entropy_coefficient: float = 0.0  # of the entropy of the policy that trains, a bonus; 0: none
    mask_truncated: bool = False  # responses that were cut, for whatever reason, do not learn
    # Truncated importance sampling: a token weighs at most tis_cap, else old policy / sampler. tis:
    # in every step, so without an internal phase | tis_full: in full-policy steps | auto: the same,
    # where rollout.max_staleness > 0 | none
    rollout_correction: str = "auto"
    tis_cap: float = 2.0

    @property
    def aggregation(self) -> str:
        """`loss_aggregation`, with what auto stands for."""
        if self.loss_aggregation != "auto":
            return self.loss_aggregation
        if self.advantage == "dr_grpo":
            return "constant_length"
        return "sequence_mean" if self.loss == "gspo" else "token_mean"

    @property
    def needs_old_logprobs(self) -> bool:
        """Must they be known before the step's first update? With one update, the ratio is 1."""
        return self.minibatches > 1 or (self.kl_coefficient > 0 and self.kl_in == "reward")
