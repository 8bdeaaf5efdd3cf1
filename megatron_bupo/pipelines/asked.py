"""What an adapter's user asks for, where a pipeline's own config has no place for our keys."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_bupo.algorithm.bupo import PhaseSchedule, Policy
from megatron_bupo.errors import InputError

if TYPE_CHECKING:  # which needs Megatron
    from megatron_bupo.pipelines.controller import PhaseController

WITHOUT_SAMPLER = (
    "train the internal phase without it, and resume with it in the full policy's phase"
)
_log = logging.getLogger(__name__)


def schedule_of(settings: Mapping[str, Any], layer: str, steps: str) -> PhaseSchedule:
    """The internal phase that `settings` ask for by their keys `layer` and `steps`."""
    stage = (_number(settings, layer, least=1), _number(settings, steps, least=0))
    return PhaseSchedule.of([stage])


def from_environment() -> PhaseSchedule:
    """That of BUPO_TARGET_LAYER and BUPO_INTERNAL_STEPS, which pipelines hand to their workers."""
    return schedule_of(os.environ, "BUPO_TARGET_LAYER", "BUPO_INTERNAL_STEPS")


def _number(settings: Mapping[str, Any], key: str, *, least: int) -> int:
    value = settings.get(key)
    if value is None:
        raise InputError(key, "is not set, so there is no internal phase to train", f"set {key}")
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        reason = "is no whole number" if least == 0 else "is no layer, counted from 1"
        raise InputError(f"{key}={value}", reason, f"choose {least} or more")
    return number


def enter(controller: PhaseController, step: int) -> Policy:
    """Set the step, and say so where the policy is another one than before."""
    before = None if controller.step is None else controller.policy
    policy = controller.set_step(step)
    if policy != before and (not dist.is_initialized() or dist.get_rank() == 0):
        # A warning because that is the level at which the pipelines' loggers stand.
        _log.warning("BuPO: from step %d on the %s policy trains", step, policy)
    return policy
