"""Megatron's optimizer, made to leave alone what the step's policy does not train.

Layers above an internal policy's target have gradients of zero, not none, in Megatron's gradient
buffers, and an Adam step with a zero gradient still moves a parameter (momentum, weight decay) and
decays its moments. A hook before the inner step takes those gradients away altogether, so
parameters and moments above the target stay as they are, bit for bit, under every Megatron
optimizer.

At a phase switch layers begin to train whose Adam state lags behind; `optimizer_at_switch` says
what happens:

    per_layer_step  each layer's bias correction counts that layer's own updates (as the authors'
                    FSDP1 code does: without a gradient, no step, and no step counted)
    common_step     one counter for all: the layers that begin take it over with moments of zero, so
                    their first updates are too large by up to (1 - beta1) / sqrt(1 - beta2)
    reset           all moments and counters start anew, also those of the layers that did train
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.optimizer import OptimizerConfig as NativeOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor, nn

from megatron_bupo.config.schema import Config, OptimizerConfig
from megatron_bupo.errors import InputError
from megatron_bupo.mcore.hf_weights import Unit
from megatron_bupo.mcore.native import build_native


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of `step` (from 0) of `steps`: linear warm-up, then constant, linear or
    cosine decay.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def native_optimizer_config(config: Config, dtype: torch.dtype) -> Any:
    """Megatron-Core's optimizer config."""
    ours = {
        "optimizer": "adam",
        "lr": config.optimizer.lr,
        "min_lr": config.optimizer.min_lr,
        "weight_decay": config.optimizer.weight_decay,
        "adam_beta1": config.optimizer.betas[0],
        "adam_beta2": config.optimizer.betas[1],
        "adam_eps": config.optimizer.eps,
        "clip_grad": config.optimizer.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": config.parallel.distributed_optimizer,
    }
    return build_native(NativeOptimizerConfig, ours, config.megatron)


class PhasedOptimizer:
    """Megatron's optimizer over DDP-wrapped chunks; each step trains some units and leaves the
    others be.
    """

    def __init__(
        self,
        ddp_chunks: Sequence[nn.Module],
        unit_of: Mapping[nn.Parameter, Unit],
        config: Config,
        dtype: torch.dtype,
    ) -> None:
        chunks: Any = list(ddp_chunks)
        self.megatron = get_megatron_optimizer(native_optimizer_config(config, dtype), chunks)
        self.config, self.at_switch = config.optimizer, config.bupo.optimizer_at_switch
        self._trained: frozenset[Unit] | None = None
        self._frozen_now: list[Tensor] = []
        self._units: dict[torch.optim.Optimizer, dict[Tensor, Unit]] = {}
        for part in self._parts():
            inner = part.optimizer
            if inner is None:
                continue
            self._units[inner] = dict(_inner_parameters(part, unit_of))
            inner.register_step_pre_hook(self._take_gradients_away)
            inner.register_step_post_hook(self._follow_common_step)
        self._require_per_parameter_steps()
        self.clear_state()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for inner in self._units for group in inner.param_groups]

    def _parts(self) -> list[Any]:
        """Megatron's optimizers, one per kind of parameter."""
        return getattr(self.megatron, "chained_optimizers", [self.megatron])

    def _require_per_parameter_steps(self) -> None:
        fused = [type(o).__name__ for o in self._units if not isinstance(o, torch.optim.AdamW)]
        if fused and self.at_switch == "per_layer_step":
            raise InputError(
                "bupo.optimizer_at_switch=per_layer_step",
                f"{fused[0]} counts steps per parameter group, not per layer",
                "choose reset or common_step",
            )

    def clear_state(self) -> None:
        """Adam's state before the first step: moments and counters of zero.

        Made at once, not lazily: Megatron's checkpoints demand a state for every parameter.
        """
        for inner, parameters in self._units.items():
            if isinstance(inner, torch.optim.AdamW):
                for p in parameters:
                    inner.state[p] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(p.data),
                        "exp_avg_sq": torch.zeros_like(p.data),
                    }
            else:
                inner.state.clear()
                for group in inner.param_groups:
                    group.pop("step", None)

    def begin_phase(self) -> None:
        """A new policy trains from the next step on."""
        if self.at_switch == "reset":
            self.clear_state()

    def step(self, trained: frozenset[Unit], lr: float) -> float:
        """Update the `trained` units at learning rate `lr`; returns the global gradient norm
        before clipping.
        """
        for group in self._groups():
            group["lr"] = lr
        self._trained = trained
        try:
            _, grad_norm, _ = cast("tuple[bool, float | None, Any]", self.megatron.step())
        finally:
            self._trained = None
        return float(grad_norm or 0.0)

    def zero_grad(self) -> None:
        """Drop the inner optimizer's gradients; without it FP32Optimizer corrupts the next ones
        silently.
        """
        self.megatron.zero_grad()

    def _take_gradients_away(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        assert self._trained is not None, "step through PhasedOptimizer.step"
        units = self._units[inner]
        self._frozen_now = [p for p, unit in units.items() if unit not in self._trained]
        for p in self._frozen_now:
            p.grad = None
            if hasattr(p, "decoupled_grad"):
                p.decoupled_grad = None  # type: ignore[attr-defined]

    def _follow_common_step(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        if self.at_switch != "common_step" or not isinstance(inner, torch.optim.AdamW):
            return
        for p in self._frozen_now:
            inner.state[p]["step"] += 1

    def steps_by_unit(self) -> dict[Unit, float]:
        """Updates that each unit's Adam state on this rank has seen; empty for fused optimizers."""
        return {
            unit: float(inner.state[p]["step"])
            for inner, parameters in self._units.items()
            for p, unit in parameters.items()
            if isinstance(inner, torch.optim.AdamW)
        }

    def set_steps(self, steps: Mapping[Unit, float]) -> None:
        """Set every parameter's own step counter (a tensor each: torch's AdamW counts them up in
        place).
        """
        for inner, parameters in self._units.items():
            if isinstance(inner, torch.optim.AdamW):
                for p, unit in parameters.items():
                    inner.state[p]["step"] = torch.tensor(float(steps[unit]))

    def load(self, state: Any, steps: Mapping[Unit, float]) -> None:
        """Take over a checkpoint's state, and each unit's own step counter."""
        for part in self._parts():
            _expect_no_step(part)
        with torch.no_grad():
            self.megatron.load_state_dict(state)
        # Upstream shares one counter tensor between all states: each update would advance it many
        # times.
        self.set_steps(steps)

    @contextmanager
    def with_one_step(self) -> Iterator[None]:
        """Inside the block all counters are equal, as Megatron's checkpoint format demands."""
        own = self.steps_by_unit()
        self.set_steps(dict.fromkeys(own, 1.0))
        try:
            yield
        finally:
            self.set_steps(own)


def _inner_parameters(
    part: Any, unit_of: Mapping[nn.Parameter, Unit]
) -> Iterator[tuple[Tensor, Unit]]:
    """The tensors that the inner optimizer of `part` steps, with the unit each belongs to.

    DistributedOptimizer steps shards of them, Float16Optimizer fp32 copies, FP32Optimizer the
    parameters.
    """
    groups = part.optimizer.param_groups
    stepped = {id(p) for group in groups for p in group["params"]}
    shards = getattr(part, "model_param_group_index_map", None)
    for parameter, unit in unit_of.items():
        if shards is not None:
            if parameter in shards:
                group, order = shards[parameter]
                yield groups[group]["params"][order], unit
            continue
        main = getattr(parameter, "main_param", None)
        tensor = parameter if main is None else main
        if id(tensor) in stepped:
            yield tensor, unit


def _expect_no_step(part: Any) -> None:
    """Let DistributedOptimizer load states without a `step`: its checkpoints of torch's AdamW
    have none.
    """
    name = "_set_main_param_and_optimizer_states"
    if not hasattr(part, name) or name in vars(part):
        return
    upstream = getattr(part, name)

    def set_states(parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        group, order = part.model_param_group_index_map[parameter]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        step = {"step": own["step"]} if "step" in own else {}
        upstream(parameter, {**step, **tensors})

    setattr(part, name, set_states)
