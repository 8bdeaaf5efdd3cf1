"""BuPO in the script that starts NeMo-RL, whose environment has no Megatron.

    install()      # before the policy is built: its workers are those of nemo_rl.py
    check(config)  # NeMo-RL's MasterConfig, before anything is

`examples/nemo_rl_bupo.py` does both for NeMo-RL's own scripts. Refused, for all of a run with
internal phases, is what the script's process computes from the sampler's log-probs or from a
teacher's, both of which are of a full policy, and where a worker would not see it.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from nemo_rl.distributed.ray_actor_environment_registry import (
    ACTOR_ENVIRONMENT_REGISTRY,
    MCORE_EXECUTABLE,
)
from nemo_rl.models.policy.lm_policy import Policy

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.asked import from_environment

WORKER = "megatron_bupo.pipelines.nemo_rl.BupoPolicyWorker"
_SAMPLER = "compares with the sampler's log-probs, which are the full policy's"
_TEACHER = "has a teacher's full policy for a target"
# Setting -> its harmless values, and what is wrong with others
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "grpo.seq_logprob_error_threshold": ((None,), _SAMPLER),
    "loss_fn.use_importance_sampling_correction": ((None, False), _SAMPLER),
    "loss_fn.use_on_policy_kl_approximation": ((None, False), _SAMPLER),
    "on_policy_distillation.enabled": ((None, False), _TEACHER),
}


def install() -> None:
    """Let every policy be made of workers that know their phase."""
    ACTOR_ENVIRONMENT_REGISTRY[WORKER] = MCORE_EXECUTABLE
    Policy.__init__ = partialmethod(Policy.__init__, worker_extension_cls_fqn=WORKER)  # type: ignore[method-assign]


def check(config: Any) -> None:
    """Refuse settings that cannot be with internal phases."""
    if not from_environment().stages:
        return
    for where, (harmless, reason) in REFUSED.items():
        section, _, name = where.partition(".")
        value = getattr(getattr(config, section, None), name, None)
        if value not in harmless:
            because = f"{reason}, and internal policies train"
            way_out = (
                f"set {where}={str(harmless[-1]).replace('None', 'null')}; once the internal phase "
                "is over, a run may resume with it and BUPO_INTERNAL_STEPS=0"
            )
            raise InputError(f"{where}={value}", because, way_out)
    if not (config.policy.get("megatron_cfg") or {}).get("enabled"):
        reason = "trains by another backend, which knows no internal phases"
        raise InputError("policy.megatron_cfg.enabled=False", reason, "set it to true")
