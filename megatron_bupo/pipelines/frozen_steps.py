"""Somebody's optimizer, made to leave alone what the phase does not train.

Layers above an internal policy's target have gradients of zero in Megatron's buffers, and a step
with a zero gradient still moves a parameter (momentum, weight decay) and its moments. So while an
optimizer steps, its parameter groups are exchanged for groups without them, whatever optimizer it
is: torch calls hooks before and after the step of every one. Nothing needs to be told of it, and
groups are their owner's again before anybody looks.

Adam divides by 1 - beta^t, where t counts a parameter's own updates. Megatron keeps one t for all,
so layers that begin to train later would take first steps that are several times too large. How
many steps each internal policy took is kept in the groups, beside `step`, and so in their owner's
checkpoints; during a step each parameter's t is without those that left it out.
"""

from __future__ import annotations

import weakref
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.chunks import trains

# Of a parameter group: the steps that each internal policy took, [[layer, read_out_norm, steps]]
INTERNAL_STEPS = "bupo_internal_steps"
COPIES = ("HybridDeviceOptimizer",)  # step copies of what they are given, by optimizers inside


class FrozenSteps:
    """While this is attached, optimizers step those of `parameters()`, which have heights, that
    `policy()` trains.
    """

    def __init__(
        self,
        parameters: Callable[[], Mapping[nn.Parameter, int]],
        policy: Callable[[], Policy],
    ) -> None:
        self._parameters, self._policy = parameters, policy
        self._heights: Any = weakref.WeakKeyDictionary()  # optimizer -> id of tensor -> height
        # optimizer at work -> its own groups, and the steps it has taken
        self._at_work: Any = weakref.WeakKeyDictionary()
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """Let optimizers step everything again."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, *_: Any) -> None:
        if optimizer in self._at_work:  # that step raised
            optimizer.param_groups, _steps = self._at_work.pop(optimizer)
        heights = self._heights_in(optimizer)
        if not heights:
            return
        policy = self._policy()
        if policy == FULL and not _internal_steps(optimizer):
            return
        if type(optimizer).__name__ in COPIES:
            reason = "steps copies of its parameters, which cannot be left out"
            raise InputError(type(optimizer).__name__, reason, "set optimizer_cpu_offload=False")
        native, steps = optimizer.param_groups, _steps_of(optimizer)
        self._at_work[optimizer] = native, steps
        optimizer.param_groups = list(_cohorts(optimizer, heights, policy, steps))

    def _after(self, optimizer: Any, *_: Any) -> None:
        if optimizer not in self._at_work:
            return
        native, steps = self._at_work.pop(optimizer)
        in_groups = any("step" in group for group in (*native, *optimizer.param_groups))
        optimizer.param_groups = native
        internal, policy = _internal_steps(optimizer), self._policy()
        if isinstance(policy, InternalLayerPolicy):
            internal[policy] = internal.get(policy, 0) + 1
        noted = [[p.layer, p.read_out_norm, n] for p, n in internal.items()]
        for group in native:
            group[INTERNAL_STEPS] = noted
            if in_groups:
                group["step"] = steps + 1
            _set_steps(optimizer, group["params"], steps + 1)

    def _heights_in(self, optimizer: Any) -> Mapping[int, int]:
        """The height of each tensor that `optimizer` steps, by id; empty if none is of ours."""
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        known: dict[int, int | None] = self._heights.get(optimizer, {})
        if any(id(p) not in known for p in stepped):
            found = _heights(stepped, self._parameters())
            known = self._heights[optimizer] = {id(p): found.get(id(p)) for p in stepped}
        ours = {key: height for key, height in known.items() if height is not None}
        if ours and len(ours) < len(stepped):
            raise RuntimeError(
                f"{type(optimizer).__name__} steps {len(stepped) - len(ours)} tensors beside those "
                "of the attached model, of which it cannot be told whether they are frozen"
            )
        return ours


def _cohorts(
    optimizer: Any, heights: Mapping[int, int], policy: Policy, steps: int
) -> Iterator[dict[str, Any]]:
    """The groups of one step: what trains, cut by the steps it has taken; and once, at a rate of
    zero, what does not, so that it has a state: Megatron's checkpoints demand one.
    """
    internal = _internal_steps(optimizer)
    missed = {h: sum(n for p, n in internal.items() if not trains(p, h)) for h in heights.values()}
    for group in optimizer.param_groups:
        cohorts: dict[tuple[bool, int], list[Tensor]] = {}
        for p in group["params"]:
            height = heights[id(p)]
            learns, age = trains(policy, height), steps - missed[height]
            if learns or not optimizer.state.get(p):
                cohorts.setdefault((learns, age), []).append(p)
        for (learns, age), parameters in cohorts.items():
            _set_steps(optimizer, parameters, age)
            rates = {} if learns else {"lr": 0.0, "weight_decay": 0.0}
            count = {"step": age} if "step" in group else {}
            yield {**group, **rates, **count, "params": parameters}


def _internal_steps(optimizer: Any) -> dict[InternalLayerPolicy, int]:
    """How many steps of `optimizer` each internal policy took."""
    noted = [group.get(INTERNAL_STEPS) or [] for group in optimizer.param_groups]
    return {InternalLayerPolicy(layer, norm): n for layer, norm, n in max(noted, default=[])}


def _heights(stepped: list[Tensor], parameters: Mapping[nn.Parameter, int]) -> Mapping[int, int]:
    """The heights of those of `stepped` that belong to `parameters`, by id: Megatron steps a
    parameter, or its fp32 copy (`main_param`), or a part of either, which lies in its memory.
    """
    owned = {id(p): height for p, height in parameters.items()}
    for parameter, height in parameters.items():
        main = getattr(parameter, "main_param", None)
        if main is not None:
            owned[id(main)] = height
    extents = sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes, height)
        for p, height in parameters.items()
        if p.nbytes
    )
    starts = [start for start, _, _ in extents]
    for tensor in stepped:
        at = bisect(starts, tensor.data_ptr()) - 1
        if id(tensor) not in owned and at >= 0 and tensor.data_ptr() < extents[at][1]:
            owned[id(tensor)] = extents[at][2]
    return owned


def _steps_of(optimizer: Any) -> int:
    """How many steps `optimizer` has taken, where it counts them: Transformer Engine's and apex's
    do for each group, torch's for each parameter.
    """
    counts = [group["step"] for group in optimizer.param_groups if "step" in group]
    counts += [state["step"] for state in optimizer.state.values() if "step" in state]
    return max(map(int, counts), default=0)


def _set_steps(optimizer: Any, parameters: list[Tensor], steps: int) -> None:
    for p in parameters:
        if "step" in (state := optimizer.state.get(p, {})):
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)
