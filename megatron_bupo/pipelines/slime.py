"""BuPO inside slime: three of its custom functions, and no fork.

    --custom-megatron-init-path megatron_bupo.pipelines.slime.check
    --custom-megatron-before-log-prob-hook-path megatron_bupo.pipelines.slime.before_log_prob
    --custom-megatron-before-train-step-hook-path megatron_bupo.pipelines.slime.before_train_step
    --custom-config-path bupo.yaml      # bupo_target_layer: 6 and bupo_internal_steps: 30

A step is one rollout, whatever the number of its updates. slime computes log-probs under up to
three sets of weights: the actor's (the ratio's denominator), the reference's (KL) and a teacher's.
The first two are of the policy that trains, as a KL between an internal policy and somebody's full
policy says nothing about how far training went. A teacher is meant in full: distillation is refused
in an internal phase, together with all that compares with what SGLang reports.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron_bupo.algorithm.bupo import InternalLayerPolicy, PhaseSchedule, Policy
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.asked import WITHOUT_SAMPLER, enter, schedule_of
from megatron_bupo.pipelines.chunks import check_schedule
from megatron_bupo.pipelines.controller import PhaseController, attach

_SAMPLER = "compares with SGLang's log-probs, which are the full policy's"
# slime's argument -> its harmless value, and what is wrong with others in an internal phase
REFUSED: dict[str, tuple[Any, str]] = {
    "use_tis": (False, _SAMPLER),
    "get_mismatch_metrics": (False, _SAMPLER),
    "use_rollout_logprobs": (False, "makes SGLang's log-probs the ratio's denominator"),
    "ci_test": (False, "asserts that SGLang's log-probs are the trained policy's"),
    "rollout_top_p": (1.0, "keeps the full policy's nucleus, which is not the internal policy's"),
    "use_opd": (False, "distils a teacher's full policy"),
    "enable_mtp_training": (False, "trains heads that read the last layer"),
}


@dataclass
class _Actor:
    """What is known of slime's actor in this process."""

    controller: PhaseController
    next_step: int  # that log-probs are computed for
    scored: Policy | None = None  # by the last log-prob pass that no training followed yet


_actors: weakref.WeakKeyDictionary[nn.Module, _Actor] = weakref.WeakKeyDictionary()


def check(args: Any) -> None:
    """Refuse what cannot work, before there is a model."""
    schedule = _schedule(args)
    check_schedule(schedule, args.num_layers)
    policy = schedule.policy_at(_step(args, _first_rollout(args)))
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(args, name, harmless)
        if isinstance(policy, InternalLayerPolicy) and value != harmless:
            flag = f"--{name.replace('_', '-')}={value}"
            raise InputError(flag, f"{reason}, and the {policy} policy trains", WITHOUT_SAMPLER)


def before_log_prob(args: Any, model: Sequence[nn.Module], store_prefix: str) -> None:
    """Log-probs of the next rollout are about to be computed, under the weights of `store_prefix`.
    slime does not say which rollout, but the train step that follows will.
    """
    del store_prefix
    if _is_actor(model):
        actor = _actor(args, model)
        actor.scored = enter(actor.controller, actor.next_step)


def before_train_step(  # noqa: PLR0917 - slime's signature
    args: Any,
    rollout_id: int,
    step_id: int,
    model: Sequence[nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
) -> None:
    """An update on rollout `rollout_id` is about to be made."""
    del step_id, optimizer, opt_param_scheduler
    if not _is_actor(model):
        return
    actor, step = _actor(args, model), _step(args, rollout_id)
    policy = enter(actor.controller, step)
    if actor.scored not in {None, policy}:
        reason = f"is rollout {rollout_id}, but its log-probs are of the {actor.scored} policy"
        way_out = f"pass --start-rollout-id {rollout_id}"
        raise InputError(f"first rollout after loading {args.load}", reason, way_out)
    actor.next_step, actor.scored = step + 1, None


def _is_actor(model: Sequence[nn.Module]) -> bool:
    """A critic's process has the same hooks."""
    return getattr(model[0], "role", "actor") == "actor"


def _actor(args: Any, model: Sequence[nn.Module]) -> _Actor:
    if model[0] not in _actors:
        check(args)
        first = _step(args, _first_rollout(args))
        _actors[model[0]] = _Actor(attach(model, _schedule(args)), first)
    return _actors[model[0]]


def _schedule(args: Any) -> PhaseSchedule:
    return schedule_of(vars(args), "bupo_target_layer", "bupo_internal_steps")


def _step(args: Any, rollout_id: int) -> int:
    """While the critic learns alone the actor takes no step."""
    return max(rollout_id - (args.num_critic_only_steps if args.use_critic else 0), 0)


def _first_rollout(args: Any) -> int:
    """The rollout that slime begins with: after the one that Megatron's checkpoint counts."""
    if args.start_rollout_id is not None:
        return int(args.start_rollout_id)
    if args.finetune or not args.load:
        return 1  # a Megatron checkpoint without a count is read as rollout 0
    of_name = re.fullmatch(r"iter_(\d{7})", Path(args.load).name)
    if args.ckpt_step or of_name:
        return int(args.ckpt_step or of_name[1]) + 1  # type: ignore[index]
    counted = (Path(args.load) / "latest_checkpointed_iteration.txt").read_text().strip()
    return 1 if counted == "release" else int(counted) + 1
