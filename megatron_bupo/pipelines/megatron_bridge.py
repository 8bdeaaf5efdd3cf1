"""BuPO on what Megatron-Bridge builds: a hook that it calls with the model, before it is wrapped.

    provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
    controller = follow(provider, PhaseSchedule.of([(6, 30)]))      # line 1, before it builds
    model = provider.provide_distributed_model(...)
    ...
    controller.set_step(step)                                       # line 2, at the head of a step

Of the releases to come, which describe models by a ModelConfig, the same. Whatever is built from
one description follows the same phases, so the reference model of a KL gives log-probs of the
policy that trains. Switched off in an internal phase is what the loop around it says
(`controller.py`): nothing in Megatron-Bridge itself samples, or compares with a sampler.
"""

from __future__ import annotations

from typing import Any

from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.controller import PhaseController


def follow(description: Any, schedule: PhaseSchedule) -> PhaseController:
    """Attach to whatever is built from `description`, a provider of Megatron-Bridge or one of its
    model configs. Returns the controller that it will follow.
    """
    controller = PhaseController(schedule)

    def attached(model: list[Any]) -> list[Any]:
        controller.extend(model)
        return model

    if hasattr(description, "register_pre_wrap_hook"):
        description.register_pre_wrap_hook(attached)
    elif hasattr(description, "pre_wrap_hooks"):
        description.pre_wrap_hooks.append(attached)
    else:
        reason = "has neither register_pre_wrap_hook nor pre_wrap_hooks"
        way_out = "attach to the model that it builds"
        raise InputError(type(description).__name__, reason, way_out)
    return controller
