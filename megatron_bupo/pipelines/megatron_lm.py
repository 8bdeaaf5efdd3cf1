"""BuPO inside Megatron-LM's own RL (`train_rl.py`): around the builder of its model.

    from megatron_bupo.pipelines.megatron_lm import BupoBuilder, PhaseSchedule
    ...
        partial(model_provider, BupoBuilder(_model_builder, PhaseSchedule.of([(6, 30)]))),

A step is one collection of rollouts, which Megatron-LM goes over in `--grpo-iterations` passes of
one or more iterations; `args.curr_iteration` says where it is. The model asks at each forward pass,
so old log-probs, the reference's and the update are of one policy. Its inference engine serves the
same model in full, whatever the phase.

Refused, for all of a run with internal phases, is what would divide by the sampler's log-probs:
`--rl-inference-logprobs-is-correction`. What Megatron-LM logs of the difference between them and
the old log-probs is, in an internal phase, the difference between two policies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.controller import PhaseController

__all__ = ["BupoBuilder", "PhaseSchedule"]

# Megatron-LM's argument -> what is wrong with it in a run with internal phases
REFUSED = {
    "rl_inference_logprobs_is_correction": "weighs tokens by the log-probs of the full policy",
    "rl_training_cuda_graphs": "captures graphs that run all layers",
    "optimizer_cuda_graph": "captures an optimizer's step that steps all layers",
    "optimizer_cpu_offload": "steps copies of the parameters, which cannot be left out",
    "use_torch_fsdp2": "waits for the gradient of every parameter",
    "use_megatron_fsdp": "waits for the gradient of every parameter",
}


class BupoBuilder:
    """`builder` of a GPTModel, whose models follow `schedule`; called as Megatron-LM calls it."""

    def __init__(self, builder: Callable[..., Any], schedule: PhaseSchedule) -> None:
        self._builder, self.controller = builder, PhaseController(schedule)

    def __call__(  # noqa: PLR0917 - Megatron-LM's signature
        self,
        args: Any,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        """The model that `builder` builds, attached."""
        check(args, self.controller.schedule)
        model = self._builder(
            args, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection
        )
        self.controller.extend([model])
        model.register_forward_pre_hook(lambda *_: self._follow(args))
        return model

    def _follow(self, args: Any) -> None:
        iteration = getattr(args, "curr_iteration", None)  # not before training begins
        if iteration is None:
            return
        every = iterations_of_a_step(args)
        if self.controller.step is None and iteration % every and self.controller.schedule.stages:
            reason = f"resumes in the midst of a collection of rollouts, which lasts {every}"
            way_out = f"resume from a multiple, and set --save-interval to one of {every}"
            raise InputError(f"iteration {iteration}", reason, way_out)
        self.controller.set_step(iteration // every)


def check(args: Any, schedule: PhaseSchedule) -> None:
    """Refuse arguments that cannot be with internal phases."""
    for name, reason in REFUSED.items():
        if schedule.stages and getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise InputError(flag, f"{reason}, and internal policies train", "leave it out")


def iterations_of_a_step(args: Any) -> int:
    """How many of Megatron-LM's iterations one collection of rollouts lasts."""
    if not getattr(args, "perform_rl_step", False):
        return 1
    responses = args.grpo_prompts_per_step * args.grpo_group_size
    return max(1, args.grpo_iterations * (responses // args.global_batch_size))
