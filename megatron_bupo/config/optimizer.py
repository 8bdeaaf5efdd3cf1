"""The knobs of AdamW, the policy's and the critic's, as a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; units: one step of the loop."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant | linear | cosine, from the end of warm-up to the last step
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 1.0  # global gradient norm
    # What some units learn at a rate of their own, e.g. {"1-6": 0.1, embedding: 0}: layers counted
    # from 1, embedding, final_norm, unembedding; 0 freezes them
    lr_factors: dict[str, float] = field(default_factory=dict)
    # An update whose loss or gradient is not finite is skipped; this many in a row stop the run
    max_skipped_updates: int = 3
