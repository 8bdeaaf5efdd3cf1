"""BuPO inside verl (0.9 and later): its Megatron engine, whose model knows its phase.

    export VERL_USE_EXTERNAL_MODULES=megatron_bupo.pipelines.verl
    export BUPO_TARGET_LAYER=6 BUPO_INTERNAL_STEPS=30

verl imports the module in every process, and the engine takes the place of verl's own for
`strategy: megatron`: a registration that names the vendor precedes one that does not. Every other
strategy is refused, as it would train the full policy and not say so.

The engine is not told which step it is. But verl moves the learning-rate scheduler once for every
update of the actor, however many mini-batches that has, so the scheduler's count is the step, in
checkpoints too. The reference, whose KL is to the same policy, follows the actor in its process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from verl.utils import tensordict_utils as tu
from verl.workers.engine import BaseEngine, EngineRegistry
from verl.workers.engine.megatron import MegatronEngineWithLMHead

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.asked import WITHOUT_SAMPLER, enter, from_environment
from megatron_bupo.pipelines.controller import PhaseController, attach

# What a batch to train on must not hold in an internal phase
REFUSED = {
    "rollout_log_probs": "actor_rollout_ref.rollout.calculate_log_probs=True",
    "rollout_is_weights": "algorithm.rollout_correction.rollout_is",
}
_VENDORS = ["nvidia", "amd"]
_OTHERS = ["fsdp", "fsdp2", "fsdp_turbo", "veomni", "torchtitan", "automodel"]


@EngineRegistry.register(model_type="language_model", backend=_OTHERS, vendor=_VENDORS)
class NoPhases(BaseEngine):
    """Stands for the engines of verl that know no internal phase."""

    def __init__(self, *_: Any, engine_config: Any, **__: Any) -> None:
        reason = "trains the full policy alone, and megatron_bupo is to train internal ones"
        way_out = "choose megatron, or leave it out of VERL_USE_EXTERNAL_MODULES"
        raise InputError(f"strategy={engine_config.strategy}", reason, way_out)


@EngineRegistry.register(model_type="language_model", backend="megatron", vendor=_VENDORS)
class BupoEngine(MegatronEngineWithLMHead):
    """verl's engine for actor and reference."""

    actor: ClassVar[BupoEngine | None] = None  # in this process: what knows the step
    controller: PhaseController
    _scored: int | None = None  # the last step that log-probs were computed for

    def initialize(self) -> None:
        schedule = from_environment()
        if schedule.stages:
            self._check()
        super().initialize()
        self.controller = attach(self.module, schedule)
        if self.lr_scheduler is not None:
            BupoEngine.actor = self

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> Any:
        step = self._step()
        enter(self.controller, step)
        if forward_only:
            self._scored = step
        elif self.controller.is_internal:
            self._check_batch(data, loss_function, step)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _step(self) -> int:
        """How often the actor was updated."""
        actor = self if self.lr_scheduler is not None else BupoEngine.actor
        if actor is None:
            reason = "in a process of its own does not know which policy its KL is to"
            raise InputError(
                "the reference", reason, "keep it with the actor, or set use_kl_loss=False"
            )
        return int(actor.lr_scheduler.num_steps)

    def _check(self) -> None:
        """Refuse settings of the engine under which the step or the phase would be wrong."""
        routes = self.engine_config.router_replay.mode
        if routes != "disabled":
            reason = "records routes of every layer, and those above the target do not run"
            raise InputError(f"megatron.router_replay.mode={routes}", reason, "set it to disabled")
        if self.engine_config.forward_only:
            return
        if not self.optimizer_config.use_checkpoint_opt_param_scheduler:
            where = "actor.optim.use_checkpoint_opt_param_scheduler=False"
            raise InputError(where, "a resumed run would begin with the internal phase", "set True")
        if "optimizer" not in self.checkpoint_config.load_contents:
            where = f"actor.checkpoint.load_contents={list(self.checkpoint_config.load_contents)}"
            reason = "leaves out the scheduler, which counts the steps"
            raise InputError(where, reason, "let it hold optimizer")

    def _check_batch(self, data: Any, loss_function: Any, step: int) -> None:
        """Refuse an update whose ratio, or whose target, is of another policy."""
        policy = self.controller.policy
        for key, setting in REFUSED.items():
            if key in data.keys():  # noqa: SIM118 - `in` asks a TensorDict for tensors only
                reason = f"brings in log-probs of the full policy, and the {policy} policy trains"
                raise InputError(setting, reason, WITHOUT_SAMPLER)
        if self._scored != step:
            where = "algorithm.rollout_correction.bypass_mode=True"
            reason = f"no old log-probs of the {policy} policy were computed for step {step}"
            raise InputError(where, reason, "set it to False")
        distils = "distillation_config" in getattr(loss_function, "keywords", {})
        if distils or tu.get_non_tensor_data(data, key="distillation_use_topk", default=False):
            reason = f"has a teacher's full policy for a target, and the {policy} policy trains"
            raise InputError("distillation.enabled=True", reason, "set it to False")
