"""BuPO in two lines of a training loop that somebody else wrote.

    controller = attach(model, PhaseSchedule.of([(6, 30)]))   # GPTModel chunks, bare or wrapped
    for step in range(steps):
        controller.set_step(step)    # before the old log-probs are computed
        ...                          # the loop as it is: sampling, old log-probs, loss, optimizer

In an internal phase the model's own forward pass gives the logits of the internal layer policy,
softmax(E h_l): layers above l do not run, and neither does the final norm. So old and new log-probs
come from one policy without the loop knowing, its loss trains that policy, and what does not run
is frozen bit for bit, optimizer state included. Parameters keep their names, and checkpoints look
as they always do.

What the loop must leave alone in an internal phase: log-probs that the sampler reports belong to
the full policy. They are no denominator of a ratio, so truncated importance sampling (TIS, rollout
correction) and checks of train-rollout mismatch are to be switched off. What serves the policy from
this very model does so in full: Megatron's own inference engines are recognised, anything else
goes into `with controller.full_policy(): ...`.

It does not matter whether the model is wrapped in DDP, and its optimizer built, before or after
`attach`. `pipelines/` has adapters for pipelines in which there is no place for these lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, PhaseSchedule, Policy
from megatron_bupo.errors import InputError
from megatron_bupo.mcore.depth import DepthRouter
from megatron_bupo.pipelines import buckets, chunks
from megatron_bupo.pipelines.frozen_steps import FrozenSteps

try:  # since Megatron-Core 0.18
    from megatron.core.inference.utils import InferenceMode  # type: ignore[attr-defined]
except ImportError:
    InferenceMode = None


class _Router(DepthRouter):
    """One that lets the inference engines of the model's own process have all of it, and whoever
    asks for the full policy, also if the phase changes meanwhile.
    """

    serving = in_full = False

    def skips_layer(self, layer: int) -> bool:
        return not (self.serving or self.in_full) and super().skips_layer(layer)

    def skips_final_norm(self) -> bool:
        return not (self.serving or self.in_full) and super().skips_final_norm()


class PhaseController:
    """Which policy do the attached models compute and train? Made by `attach`, or by an adapter
    that attaches what its pipeline builds later.

    Every rank calls every method with equal arguments. Nothing in here communicates.
    """

    def __init__(self, schedule: PhaseSchedule) -> None:
        self.schedule = schedule
        self.step: int | None = None  # that was last set
        self._left_before: int | None = None
        self._router = _Router()
        self._chunks: list[GPTModel] = []
        self._wrappers: list[nn.Module] = []
        self._applied: tuple[Policy, int, int] | None = None
        self._frozen = FrozenSteps(self._heights, self._trained_policy)
        self._hooks: list[Any] = [register_module_module_registration_hook(self._see)]

    @property
    def policy(self) -> Policy:
        """The policy that the step trains, whose logits the model gives; full before the first
        `set_step`.
        """
        if self.step is None or (self._left_before is not None and self.step >= self._left_before):
            return FULL
        return self.schedule.policy_at(self.step)

    @property
    def is_internal(self) -> bool:
        """Does the step train an internal policy?"""
        return isinstance(self.policy, InternalLayerPolicy)

    def set_step(self, step: int) -> Policy:
        """`step` (the loop's turn, from 0) begins, or goes on; returns the policy that it trains.

        To be called before the old log-probs of a rollout are computed, and not again with another
        step before the last update on that rollout. As the step decides alone, a resumed loop that
        sets its step is in the right phase.
        """
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        self.step = step
        self._apply()
        return self.policy

    def leave_internal_phase(self, step: int) -> None:
        """From `step` on train the full policy, whatever the schedule says: what a guard against
        collapse calls. `state_dict` remembers it.
        """
        self._left_before = step
        self._apply()

    @contextmanager
    def full_policy(self) -> Iterator[None]:
        """Inside the block the model computes the full policy, without gradients: to evaluate, or
        to sample, in an internal phase.
        """
        outer, self._router.in_full = self._router.in_full, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._router.in_full = outer

    def state_dict(self) -> dict[str, int | None]:
        """What a checkpoint must know that the step does not say: whether the phase was left."""
        return {"left_before_step": self._left_before}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Take over what `state_dict` gave."""
        self._left_before = state["left_before_step"]
        self._apply()

    def extend(self, model_chunks: Sequence[nn.Module]) -> None:
        """Attach more chunks of the same model, or another one with as many layers that follows
        the same phases, as the reference of a KL does.
        """
        for module in model_chunks:
            chunk, wrappers = chunks.gpt_model(module)
            chunks.check_chunk(chunk, self.schedule)
            self._router.route([chunk])
            self._chunks.append(chunk)
            self._wrappers += wrappers
            enter = partial(self._enter, chunks.unembedding(chunk))
            self._hooks.append(
                cast("nn.Module", chunk.decoder).register_forward_pre_hook(enter, with_kwargs=True)
            )
        self._apply()

    def detach(self) -> None:
        """Make model, DDP and optimizers what they were. What an optimizer has left out stays noted
        in its groups.
        """
        self._frozen.detach()
        self._router.detach()
        for hook in self._hooks:
            hook.remove()
        for ddp in self._ddps:
            buckets.release(ddp)
        self._hooks, self._chunks, self._wrappers = [], [], []

    @property
    def _ddps(self) -> list[DistributedDataParallel]:
        return [w for w in self._wrappers if isinstance(w, DistributedDataParallel)]

    def _heights(self) -> dict[nn.Parameter, int]:
        """Each attached parameter with the layer that a policy must reach to train it."""
        return {p: height for chunk in self._chunks for p, height in chunks.heights(chunk)}

    def _trained_policy(self) -> Policy:
        """What an optimizer that is about to step this model trains."""
        if self.step is None and self.schedule.stages:
            reason = "a model with internal phases is about to train, but of which step?"
            raise RuntimeError(f"{reason} call controller.set_step(step) first")
        return self.policy

    def _apply(self) -> None:
        """Bring router and buckets into the phase; quick where they are."""
        state = self.policy, len(self._chunks), len(self._wrappers)
        if state == self._applied:
            return
        self._applied, self._router.policy = state, self.policy
        for wrapper in self._wrappers:
            chunks.check_wrapper(wrapper)
        for chunk in self._chunks:
            chunks.check_whole(chunk)
        heights = self._heights().items()
        trained = {p for p, height in heights if chunks.trains(self.policy, height)}
        for ddp in self._ddps:
            buckets.train_only(ddp, trained)

    def _see(self, module: nn.Module, _name: str, child: nn.Module | None) -> None:
        """Take note of what is wrapped around the model after it was attached."""
        if child in self._chunks or child in self._wrappers:
            self._wrappers.append(module)

    def _enter(
        self, unembedding: Set[nn.Parameter], _decoder: nn.Module, _args: Any, kwargs: Any
    ) -> None:
        """A forward pass begins: is it one of an inference engine?"""
        if InferenceMode is not None:
            self._router.serving = InferenceMode.is_active()
        else:
            self._router.serving = kwargs.get("inference_context") is not None
        if self.is_internal and not self._router.serving:
            chunks.check_graphs(self._chunks[0])
            for ddp in self._ddps:
                buckets.gather(ddp, unembedding)


def attach(
    model_chunks: nn.Module | Sequence[nn.Module], schedule: PhaseSchedule
) -> PhaseController:
    """Let `schedule` say which policy `model_chunks` compute and train.

    `model_chunks`: this rank's GPTModels (one, or one per virtual pipeline stage), bare or inside
    Float16Module and Megatron's DistributedDataParallel. What cannot work is refused by name.
    """
    modules = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    if not modules:
        raise InputError("model_chunks=[]", "nothing to attach to", "pass what was built")
    controller = PhaseController(schedule)
    try:
        controller.extend(modules)
    except BaseException:
        controller.detach()
        raise
    return controller
