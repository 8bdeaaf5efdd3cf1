"""Which layouts fit, and which is fastest? All of them are planned: a plan takes a millisecond.

Servers that share the trainer's GPUs are as many as its ranks ask for, and get what it leaves. What
is proposed passes all rules by which a run starts.

A recipe that does not fit is shown the smallest change that makes it fit: of all changes of few
settings, those of fewest settings, and of these the one whose step is shortest; data-parallel
ranks follow from the other sizes. If none of them does, a layout of as many GPUs that fits is
named, and else the smallest number of GPUs on which one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.internal_layout_rules import check_internal_layout
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.parallel_rules import check_parallel
from megatron_bupo.config.server_rules import gpus_per_server
from megatron_bupo.errors import InputError
from megatron_bupo.planner.changes import (
    FRACTION,
    LEAST_BYTES,
    OF_PARALLEL,
    ROOM,
    SIZES,
    Changes,
    changed,
    large_enough_servers,
    layouts,
    single_changes,
    together,
)
from megatron_bupo.planner.counts import all_parameters
from megatron_bupo.planner.hardware import Hardware
from megatron_bupo.planner.plan import Plan, Recipe, make_plan, shares_servers, world_of

LEAST_FRACTION = 0.1
MOST_GPUS = 4096
WORTH_IT = 0.9  # of an internal step's training: for less, another layout is not mentioned


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, as settings."""

    changes: Changes
    plan: Plan


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


def proposals(recipe: Recipe, hardware: Hardware, gpus: int) -> Iterator[Proposal]:
    """Layouts of `gpus` that fit, the fastest full-policy step first."""
    found: dict[tuple[Any, ...], Proposal] = {}
    servers = large_enough_servers(recipe, hardware)
    for layout in layouts(recipe, hardware, gpus):
        proposal = _tried(recipe, hardware, gpus, {**layout, **servers}, shrinks=True)
        if proposal is not None:
            config = proposal.plan.recipe.config
            key = (proposal.plan.full.layout, config.megatron.get("recompute_granularity"))
            found.setdefault(key, proposal)
    fastest = sorted(found.values(), key=lambda found: _speed(found.plan))
    return (proposal for proposal in fastest if _starts(proposal))


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
        found = _tried(recipe, hardware, gpus, {"bupo.internal_layout": own})
        if found is not None and _starts(found):
            best = min(best or found.plan, found.plan, key=_internal_s)
    now = _tried(recipe, hardware, gpus, {})
    if best is None or (now is not None and _internal_s(best) > WORTH_IT * _internal_s(now.plan)):
        return None
    return best


def _internal_s(plan: Plan) -> float:
    return plan.phases[0].time.train_s


def smallest_change(recipe: Recipe, hardware: Hardware, gpus: int) -> Proposal | None:
    """What makes the recipe fit on `gpus`, if anything does; see the top."""
    for number in (1, 2, 3):
        fitting = [
            found
            for group in combinations(list(single_changes(recipe, hardware)), number)
            if (changes := together(group)) is not None
            if (found := _tried(recipe, hardware, gpus, _with_open_dp(changes))) is not None
        ]
        for found in sorted(fitting, key=lambda found: _speed(found.plan)):
            if _starts(found):
                return found
    return next(proposals(recipe, hardware, gpus), None)


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
    least = LEAST_BYTES * all_parameters(recipe.policy) / hardware.memory_bytes
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if gpus < least:
            continue
        if fitting := next(proposals(recipe, hardware, gpus), None):
            return gpus, fitting
    return None


def _tried(
    recipe: Recipe, hardware: Hardware, gpus: int, changes: Changes, *, shrinks: bool = False
) -> Proposal | None:
    """What `changes` come to, with what follows from them; None if that does not fit. `shrinks`:
    servers beside the trainer may get less memory.
    """
    known = {key: value for key, value in changes.items() if value is not ROOM}
    config = changed(recipe.config, known)
    if shares_servers(config) and gpus % gpus_per_server(config) == 0:
        count = gpus // gpus_per_server(config)
        known |= {} if count == config.servers.count else {"servers.count": count}
    try:
        plan = planned(recipe, hardware, gpus, known)
        wanted = changes.get(FRACTION) is ROOM or (shrinks and plan.only_servers_are_too_large)
        if wanted and plan.room >= LEAST_FRACTION:
            known[FRACTION] = plan.room
            plan = planned(recipe, hardware, gpus, known)
    except InputError:
        return None
    return Proposal({**known, **_dp_of(recipe, plan)}, plan) if plan.fits else None


def _starts(proposal: Proposal) -> bool:
    """Would a run with these settings, by all rules?"""
    config, layout = proposal.plan.recipe.config, proposal.plan.full.layout
    try:
        check(config, layout.world, here=False)
    except InputError:
        return False
    return True
