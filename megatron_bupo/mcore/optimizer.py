"""Megatron's optimizer, made to step what the step's policy trains, at its rate, and nothing else.

Layers above an internal policy's target have gradients of zero, not none, in Megatron's gradient
buffers, and an Adam step with a zero gradient still moves a parameter (momentum, weight decay) and
decays its moments. So for the length of a step the inner optimizer's parameter groups are exchanged
for others: trained parameters alone, one group for each learning-rate factor and age. Gradient
norm, clipping and step then see nothing else, under every Megatron optimizer, and what is not in a
group stays as it is, bit for bit. Between steps, and so in checkpoints, the groups are Megatron's.

A unit's age is the number of its updates, which Adam's bias correction divides by. It is counted
here and told to the inner optimizer before each step, whether that keeps a counter for each
parameter (torch) or for each group (Transformer Engine, apex). At a phase switch units begin to
train whose Adam state lags behind; `bupo.optimizer_at_switch` says what happens:

    per_layer_step  each unit keeps its moments and counts its own updates (as the authors' FSDP1
                    code does: without a gradient, no step, and no step counted)
    common_step     the oldest unit's age for all: units that begin have moments of zero, so
                    their first updates are too large by up to (1 - beta1) / sqrt(1 - beta2)
    reset           all moments and counters start anew, also those of the units that did train
    warmup          as per_layer_step, and the learning rate warms up again (see `learning_rate`)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as NativeOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from megatron_bupo.config.schema import Config
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.hf_weights import Unit
from megatron_bupo.mcore.native import build_native


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
    """Megatron's optimizer over DDP-wrapped chunks; each step trains some of the model's `units`
    and leaves the others be.
    """

    def __init__(
        self,
        ddp_chunks: Sequence[nn.Module],
        unit_of: Mapping[nn.Parameter, Unit],
        units: Sequence[Unit],
        config: Config,
        dtype: torch.dtype,
    ) -> None:
        self._chunks: Any = list(ddp_chunks)
        self.megatron = get_megatron_optimizer(native_optimizer_config(config, dtype), self._chunks)
        self.clip_grad, self.at_switch = config.optimizer.clip_grad, config.bupo.optimizer_at_switch
        self.steps: dict[Unit, int] = dict.fromkeys(units, 0)  # updates of each, on any rank
        self._unit_of: dict[torch.optim.Optimizer, dict[Tensor, Unit]] = {
            part.optimizer: dict(_inner_parameters(part, unit_of)) for part in self._parts()
        }
        for part in self._parts():
            # Not at the first step, as Adam would: Megatron's checkpoints demand a state for every
            # parameter.
            part.init_state_fn(part.optimizer, part.config)
        self._level_counters()

    def _parts(self) -> list[Any]:
        """Megatron's optimizers that have something to step, one per kind of parameter."""
        parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in parts if part.optimizer is not None]

    def _level_counters(self) -> None:
        """Give every parameter's own counter, where there is one, the same value.

        Megatron's checkpoints demand it; nothing reads it, see `steps`.
        """
        for inner in self._unit_of:
            for state in inner.state.values():
                if isinstance(inner, torch.optim.Adam):
                    state["step"] = torch.tensor(1.0)

    def begin_phase(self) -> None:
        """A new policy trains from the next step on."""
        if self.at_switch != "reset":
            return
        self.steps = dict.fromkeys(self.steps, 0)
        for inner in self._unit_of:
            for state in inner.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()

    @torch.no_grad()
    def step(self, trained: Mapping[Unit, float], lr: float, *, loss: float = 0.0) -> float:
        """Update the `trained` units, each at its factor times `lr`; returns the global gradient
        norm before clipping.

        Where `loss` or that norm is not finite on any rank, none changes anything, and all return
        a norm that is not finite.
        """
        with self._only(trained, lr):
            overflow = self.megatron.prepare_grads()
            norm: Any = self.megatron.get_grad_norm()
            finite = not overflow and math.isfinite(norm) and math.isfinite(loss)
            if parallel.on_any_rank(not finite):
                return math.nan if math.isfinite(norm) else float(norm)
            for part in self._parts():
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.clip_grad, norm)
            with ExitStack() as stack:
                for chunk in self._chunks:
                    stack.enter_context(chunk.stepping())
                self.megatron.step_with_ready_grads()
        for unit in trained:
            self.steps[unit] += 1
        return float(norm)

    @contextmanager
    def _only(self, trained: Mapping[Unit, float], lr: float) -> Iterator[None]:
        """Inside the block the inner optimizers have nothing but the `trained` units."""
        native = {inner: inner.param_groups for inner in self._unit_of}
        ages = self.steps
        if self.at_switch == "common_step":
            ages = dict.fromkeys(ages, max(ages.values()))
        for inner in native:
            inner.param_groups = list(self._groups(inner, trained, lr, ages))
            if hasattr(inner, "param_groups_master"):  # apex walks both lists, to the shorter's end
                masters = [{"params": [None] * len(g["params"])} for g in inner.param_groups]
                inner.param_groups_master = masters  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for inner, groups in native.items():
                inner.param_groups = groups

    def _groups(
        self,
        inner: torch.optim.Optimizer,
        trained: Mapping[Unit, float],
        lr: float,
        ages: Mapping[Unit, int],
    ) -> Iterator[dict[str, Any]]:
        """`inner`'s groups for one step, cut by learning-rate factor and age."""
        for group in inner.param_groups:
            cohorts: dict[tuple[float, int], list[Tensor]] = {}
            for p in group["params"]:
                unit = self._unit_of[inner][p]
                if unit in trained:
                    cohorts.setdefault((trained[unit], ages[unit]), []).append(p)
            for (factor, age), parameters in cohorts.items():
                if isinstance(inner, torch.optim.Adam):
                    for p in parameters:
                        inner.state[p]["step"].fill_(age)
                yield {**group, "params": parameters, "lr": lr * factor, "step": age}

    def zero_grad(self) -> None:
        """Drop the inner optimizer's gradients; without it FP32Optimizer corrupts the next ones
        silently.
        """
        self.megatron.zero_grad()

    def sharded_state_dict(self, model: dict[str, Any], *, loading: bool, metadata: Any) -> Any:
        """What Megatron saves or loads of the optimizer, without `steps`; `model`: the same of
        the model.
        """
        self._level_counters()
        return self.megatron.sharded_state_dict(model, is_loading=loading, metadata=metadata)

    def load(self, state: Any, steps: Mapping[Unit, float]) -> None:
        """Take over a checkpoint's state, and each unit's own step counter."""
        for part in self._parts():
            _expect_no_step(part)
        with torch.no_grad():
            self.megatron.load_state_dict(state)
        # Upstream shares one counter tensor between all states: each update would advance it many
        # times.
        self._level_counters()
        self.steps |= {unit: int(count) for unit, count in steps.items()}


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
