"""Do trainer and sampler compute the same policy? A disagreement is told when it is first seen."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bupo.config.schema import Config

MEAN, KL = "rollout/logprob_gap_mean_nats", "rollout/logprob_gap_k3_nats"
# Float noise of two fp32 engines is below 1e-5 nats, of a bf16 one about 0.02.
LARGE_MEAN = 1e-3
# A sampler that far away is no longer the policy that learns, in whatever precision.
LARGE_KL = 0.05
WORSE = 2.0  # times what was told last: worth telling again


class Mismatch:
    """The worst disagreement that was told; a resumed run tells anew."""

    def __init__(self, config: Config) -> None:
        # In fp32 nothing but older weights may part the two.
        exact = config.model.dtype == "float32" and not config.rollout.max_staleness
        self._limits = {MEAN: LARGE_MEAN, KL: LARGE_KL} if exact else {KL: LARGE_KL}

    def after(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What there is to tell of the gap in `metrics`, measured at `step` (from 0)."""
        beyond = {
            key for key, limit in self._limits.items() if key in metrics and metrics[key] > limit
        }
        if not beyond:
            return []
        for key in beyond:
            self._limits[key] = WORSE * metrics[key]
        text = (
            f"step {step + 1}: trainer and sampler are {metrics[MEAN]:.2g} nats a token apart "
            f"about the full policy (KL {metrics[KL]:.2g}): another precision, older weights or "
            "another model; sync.verify=true tells whether weights arrive"
        )
        return [text]
