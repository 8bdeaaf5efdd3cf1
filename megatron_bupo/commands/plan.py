"""`megatron-bupo plan`: does the recipe fit, and what would?"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from megatron_bupo.command_line import write_json
from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.schema import AUTO
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.planner.changes import as_settings, what_differs
from megatron_bupo.planner.hardware import Hardware, read_hardware
from megatron_bupo.planner.known_models import models_of
from megatron_bupo.planner.plan import Plan, Recipe, make_plan, world_of
from megatron_bupo.planner.propose import (
    enough_gpus,
    internal_layout,
    proposals,
    smallest_change,
)
from megatron_bupo.planner.report import Answer, as_json, show
from megatron_bupo.planner.serving import server_gpus
from megatron_bupo.planner.workload import workload_of

WIDTH = 110  # of what goes to a file
AUTO_SHARE = 6  # the paper's layer 6 of 36 stands for one that is not chosen yet


def run(args: Namespace) -> None:
    """Print the plan; an InputError if the recipe does not fit."""
    hardware = read_hardware(args.gpu, args.hardware)
    recipe, notes = recipe_of(args)
    plan = plan_of(recipe, hardware, args.gpus)
    answer = Answer(
        plan,
        notes,
        list(islice(proposals(recipe, hardware, plan.gpus), args.propose)),
        internal_layout(recipe, hardware, plan.gpus) if args.propose else None,
    )
    if args.json == "-":
        sys.stdout.write(as_json(answer))
    else:
        show(answer, Console(width=None if sys.stdout.isatty() else WIDTH))
        if args.json:
            write_json(Path(expand(args.json)), as_json(answer))
    if not plan.fits:
        way_out = way_to_fit(recipe, hardware, plan.gpus)
        raise InputError(args.recipe, f"does not fit: {plan.problems[0]}", way_out)


def recipe_of(args: Namespace) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that the command line names, and what to know of it."""
    config = load_config(args.recipe, args.overrides)
    if args.gpus is not None:  # they leave a number of replicas
        config = replace(config, parallel=replace(config.parallel, dp=None))
    policy, critic, notes = models_of(config)
    config, assumed = _with_a_layer(config, policy)
    work = workload_of(
        config, prompt_tokens=args.prompt_tokens, response_tokens=args.response_tokens
    )
    if work.prompt_tokens > config.data.max_prompt_tokens:
        where = f"--prompt-tokens {args.prompt_tokens}"
        raise InputError(where, f"is above data.max_prompt_tokens={config.data.max_prompt_tokens}")
    if work.response_tokens > work.longest_response:
        where = f"--response-tokens {args.response_tokens}"
        reason = f"is above rollout.max_response_tokens={work.longest_response}"
        raise InputError(where, reason)
    return Recipe(config, policy, critic, work), (*notes, *assumed)


def plan_of(recipe: Recipe, hardware: Hardware, gpus: int | None) -> Plan:
    """The plan on `gpus` (None: as many as it asks for), of a recipe that would start there."""
    config = recipe.config
    served = 0 if config.rollout.colocated else server_gpus(config)
    if gpus is not None and gpus <= served:
        where = f"--gpus {gpus}"
        raise InputError(
            where, f"the recipe's servers use {served} of them", "give more, or fewer servers"
        )
    layout = check(config, world_of(config, gpus), here=False)
    check_against_model(config, recipe.policy)
    return make_plan(recipe, hardware, layout)


def way_to_fit(recipe: Recipe, hardware: Hardware, gpus: int) -> str:
    """The smallest change that makes `recipe` fit, in words."""
    change = smallest_change(recipe, hardware, gpus)
    if change is not None:
        return f"set {as_settings(what_differs(recipe.config, change.changes))}"
    more = enough_gpus(recipe, hardware, gpus)
    if more is None:
        return "no number of these GPUs would do"
    enough, proposal = more
    return f"give it {enough} GPUs and set " + as_settings(
        what_differs(recipe.config, proposal.changes)
    )


def _with_a_layer(config: Config, arch: Architecture) -> tuple[Config, tuple[str, ...]]:
    """The config with a layer in the place of auto."""
    if config.bupo.target_layer != AUTO:
        return config, ()
    layer = max(1, arch.layers // AUTO_SHARE)
    note = f"bupo.target_layer=auto: planned with layer {layer}, a sixth of the layers"
    return replace(config, bupo=replace(config.bupo, target_layer=layer)), (note,)
