"""Which layouts fit, and which is fastest? All of them are planned: a plan takes a millisecond.

A recipe that does not fit is shown the smallest change that makes it fit: of all changes of few
settings, those of fewest settings, and of these the one whose step is shortest; data-parallel
ranks follow from the other sizes. If none of them does, a layout of as many GPUs that fits is
named, and else the smallest number of GPUs on which one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from megatron_bupo.config.checks import check_against_model
from megatron_bupo.config.internal_layout_rules import check_internal_layout
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.parallel_rules import check_parallel
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.planner.activations import FULL
from megatron_bupo.planner.hardware import Hardware
from megatron_bupo.planner.plan import Plan, Recipe, make_plan, world_of

Changes = Mapping[str, Any]  # dotted key -> value

SIZES = (1, 2, 4, 8, 16, 32)
RECOMPUTE: Changes = {
    "megatron.recompute_granularity": FULL,
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
FRACTIONS = (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
MOST_GPUS = 4096
WORTH_IT = 0.9  # of an internal step's training: for less, another layout is not mentioned
OF_PARALLEL = ("tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, as settings."""

    changes: Changes
    plan: Plan


def changed(config: Config, changes: Changes) -> Config:
    """`config` with other settings."""
    for key, value in changes.items():
        section, name = key.split(".")
        found = getattr(config, section)
        if isinstance(found, dict):
            new: Any = {k: v for k, v in {**found, name: value}.items() if v is not None}
        else:
            new = replace(found, **{name: value})
        config = replace(config, **{section: new})
    return config


def planned(recipe: Recipe, hardware: Hardware, gpus: int | None, changes: Changes) -> Plan:
    """The plan of `recipe` with `changes`, on `gpus`.

    Raises:
        InputError: the layout does not divide the ranks or the model.
    """
    config = changed(recipe.config, changes)
    check_parallel(config)
    world = world_of(config, gpus)
    if world is not None and world < 1:
        raise InputError(f"--gpus {gpus}", "leaves the trainer none beside the servers")
    layout = parallel_sizes(config, world)
    check_internal_layout(config, layout.world)
    check_against_model(config, recipe.policy)
    return make_plan(replace(recipe, config=config), hardware, layout)


def proposals(recipe: Recipe, hardware: Hardware, gpus: int) -> list[Proposal]:
    """Layouts of `gpus` that fit, the fastest full-policy step first."""
    found: dict[tuple[Any, ...], Proposal] = {}
    for changes in _layouts(recipe, hardware):
        plan = _tried(recipe, hardware, gpus, changes)
        if plan is not None and plan.fits:
            key = (plan.full.layout, plan.recipe.config.megatron.get("recompute_granularity"))
            found.setdefault(key, Proposal({**changes, **_dp_of(recipe, plan)}, plan))
    return sorted(found.values(), key=lambda found: _speed(found.plan))


def internal_layout(recipe: Recipe, hardware: Hardware, gpus: int) -> Plan | None:
    """The plan with the layout of the internal phases' own (`bupo.internal_layout`) that makes
    them fastest, where it beats what the recipe has; without a pipeline, which divides any layer.
    """
    config = recipe.config
    if not config.bupo.phases():
        return None
    best: Plan | None = None
    for tp in (size for size in SIZES if size <= hardware.node.gpus):
        own = replace(
            config.parallel, tp=tp, sp=tp > 1, pp=1, vpp=1, dp=None, cp=1, ep=config.parallel.ep
        )
        plan = _tried(recipe, hardware, gpus, {"bupo.internal_layout": own})
        if plan is None or not plan.fits:
            continue
        if best is None or _internal_s(plan) < _internal_s(best):
            best = plan
    now = _tried(recipe, hardware, gpus, {})
    if best is None or (now is not None and _internal_s(best) > WORTH_IT * _internal_s(now)):
        return None
    return best


def _internal_s(plan: Plan) -> float:
    return plan.phases[0].time.train_s


def smallest_change(recipe: Recipe, hardware: Hardware, gpus: int) -> Proposal | None:
    """What makes the recipe fit on `gpus`, if anything does; see the top."""
    for number in (1, 2, 3):
        fitting = [
            Proposal({**changes, **_dp_of(recipe, plan)}, plan)
            for group in combinations(list(_single_changes(recipe, hardware)), number)
            if (changes := _together(group)) is not None
            if (plan := _tried(recipe, hardware, gpus, _with_open_dp(changes))) is not None
            if plan.fits
        ]
        if fitting:
            return min(fitting, key=lambda found: _speed(found.plan))
    return next(iter(proposals(recipe, hardware, gpus)), None)


def _with_open_dp(changes: Changes) -> Changes:
    """`changes`, after which as many ranks are there as before."""
    sizes = {f"parallel.{name}" for name in OF_PARALLEL}
    return {**changes, "parallel.dp": None} if sizes & changes.keys() else changes


def _dp_of(recipe: Recipe, plan: Plan) -> Changes:
    """What data parallelism becomes by `plan`, where the recipe says what it is."""
    given = recipe.config.parallel.dp is not None
    return {"parallel.dp": plan.full.layout.dp} if given else {}


def _speed(plan: Plan) -> tuple[float, float]:
    """By what plans are ranked: a full policy's step; where that is all generation, training."""
    return plan.full.time.total_s, plan.full.time.train_s


def enough_gpus(recipe: Recipe, hardware: Hardware, gpus: int) -> tuple[int, Proposal] | None:
    """The smallest doubling of `gpus` on which a layout fits."""
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if fitting := proposals(recipe, hardware, gpus):
            return gpus, fitting[0]
    return None


def _tried(recipe: Recipe, hardware: Hardware, gpus: int, changes: Changes) -> Plan | None:
    try:
        return planned(recipe, hardware, gpus, changes)
    except InputError:
        return None


def _layouts(recipe: Recipe, hardware: Hardware) -> Iterator[Changes]:
    """All that are tried: sizes by powers of two, with the distributed optimizer, with and without
    recomputation.
    """
    node, arch = hardware.node.gpus, recipe.policy
    tensor = [size for size in SIZES if size <= node and arch.kv_heads % size == 0]
    stages = [size for size in SIZES if arch.layers % size == 0]
    experts = SIZES if arch.experts else (1,)
    for tp, pp, cp, ep in product(tensor, stages, (1, 2, 4), experts):
        if cp > 1 and tp * cp > node:
            continue
        settings: dict[str, Any] = {
            "parallel.tp": tp,
            "parallel.pp": pp,
            "parallel.vpp": 1,
            "parallel.cp": cp,
            "parallel.ep": ep,
            "parallel.etp": 1 if arch.experts else None,
            "parallel.dp": None,
            "parallel.sp": tp > 1,
            "parallel.distributed_optimizer": True,
        }
        yield {**settings, "megatron.recompute_granularity": None}
        yield {**settings, **RECOMPUTE}


def _single_changes(recipe: Recipe, hardware: Hardware) -> Iterator[Changes]:
    """Changes that save memory, each of one setting or of what belongs to it."""
    config = recipe.config
    parallel = config.parallel
    if config.megatron.get("recompute_granularity") != FULL:
        yield RECOMPUTE
    if not parallel.distributed_optimizer:
        yield {"parallel.distributed_optimizer": True}
    if parallel.tp > 1 and not parallel.sp:
        yield {"parallel.sp": True}
    if config.rollout.engine == "sglang":
        now = config.sglang.get("mem_fraction_static", 0.88)
        yield from ({"sglang.mem_fraction_static": f} for f in FRACTIONS if f != now)
    budget = config.trainer.max_tokens_per_microbatch
    if budget > recipe.work.longest:
        yield {"trainer.max_tokens_per_microbatch": recipe.work.longest}
    if config.trainer.logprob_chunk_tokens > 256:
        yield {"trainer.logprob_chunk_tokens": 256}
    for name in OF_PARALLEL if recipe.policy.experts else OF_PARALLEL[:-1]:
        for size in SIZES:
            if size > getattr(parallel, name) and (name != "tp" or size <= hardware.node.gpus):
                # sequence parallelism comes with tensor parallelism
                yield {f"parallel.{name}": size} | ({"parallel.sp": True} if name == "tp" else {})


def _together(group: tuple[Changes, ...]) -> Changes | None:
    """All changes of a group, if no two speak of one setting."""
    keys = [key for changes in group for key in changes]
    if len(set(keys)) < len(keys):
        return None
    return {key: value for changes in group for key, value in changes.items()}


def as_settings(changes: Changes) -> str:
    """As they are written on a command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def what_differs(config: Config, changes: Changes) -> Changes:
    """Those of `changes` that `config` does not have already."""
    return {key: value for key, value in changes.items() if _value(config, key) != value}


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    found = getattr(config, section)
    return found.get(name) if isinstance(found, dict) else getattr(found, name)


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
