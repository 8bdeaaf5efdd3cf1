"""Settings of the algorithm that run, but do not do what they seem to."""

from __future__ import annotations

from megatron_bupo.config.schema import Config

# algorithm/kl.py says why; on the demo's bed each shows within a dozen steps.
_KL_DOUBTS = {
    ("k1", "loss"): "does not restrain the policy (its gradient is zero on average)",
    ("k2", "reward"): "drives the policy away from the reference",
    ("k3", "reward"): "drives the policy away from the reference",
}


def doubts(config: Config) -> list[str]:
    """What to tell the person who starts the run; each with the way out."""
    algorithm = config.algorithm
    doubt = _KL_DOUBTS.get((algorithm.kl_estimator, algorithm.kl_in))
    if not algorithm.kl_coefficient or doubt is None:
        return []
    where = f"algorithm.kl_estimator={algorithm.kl_estimator} in the {algorithm.kl_in}"
    return [f"warning: {where} {doubt}; use k1 in the reward, k2 or k3 in the loss"]
