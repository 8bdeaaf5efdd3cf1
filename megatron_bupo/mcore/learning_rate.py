"""The learning rate as a pure function of the step: there is nothing of it to store.

Linear warm-up at the start, then constant, linear or cosine decay to the last step; both begin with
the first step that trains the model (`critic.warmup_steps` may come before). With
`bupo.optimizer_at_switch=warmup` each later phase begins with a linear warm-up of its own, of
`bupo.switch_warmup_steps` steps, for all that it trains.
"""

from __future__ import annotations

import math

from megatron_bupo.config.schema import Config, OptimizerConfig


def learning_rate(step: int, config: Config, *, phase_start: int = 0) -> float:
    """The learning rate of `step` (from 0), whose phase began with step `phase_start`."""
    rested = config.resting_steps
    lr = _scheduled(step - rested, config.steps - rested, config.optimizer)
    if config.bupo.optimizer_at_switch == "warmup" and phase_start > rested:
        lr *= min(1.0, (step - phase_start + 1) / config.bupo.switch_warmup_steps)
    return lr


def _scheduled(step: int, steps: int, config: OptimizerConfig) -> float:
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
