"""The knobs of PPO's critic, as a part of `schema.py`; without `algorithm.advantage=gae`: none."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bupo.config.optimizer import OptimizerConfig


@dataclass(frozen=True)
class CriticConfig:
    """A model of its own, under the policy's layout, that says what a response will earn."""

    # HF checkpoint that it begins with; None: model.path. Its value head is that checkpoint's
    # `score.weight`, as reward models have one, or zero
    path: str | None = None
    # Steps at the start in which the critic learns alone; the phase schedule begins after them
    warmup_steps: int = 0
    minibatches: int | None = None  # updates per step; None: algorithm.minibatches
    # Values are clipped to so far from those before the step's first update; None: not at all
    clip_range: float | None = 0.5
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
