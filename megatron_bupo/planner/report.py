"""A plan for people (tables and a verdict) and for programs (JSON with keys that stay)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_bupo.config.layout import Layout
from megatron_bupo.planner.changes import as_settings, what_differs
from megatron_bupo.planner.counts import all_parameters
from megatron_bupo.planner.hardware import GIB
from megatron_bupo.planner.memory import StageMemory
from megatron_bupo.planner.plan import Phase, Plan
from megatron_bupo.planner.propose import Proposal

STAGES_SHOWN = 8
CATEGORIES = (
    "weights",
    "gradients",
    "optimizer",
    "critic",
    "activations",
    "working",
    "context",
    "fragments",
)


@dataclass(frozen=True)
class Answer:
    """A plan, what to know of it, and what else would do."""

    plan: Plan
    notes: Sequence[str]
    proposals: Sequence[Proposal]
    internal: Plan | None  # with a better layout for the internal phases


def show(answer: Answer, console: Console) -> None:
    """Print it."""
    plan, notes, found = answer.plan, answer.notes, answer.proposals
    for line in _head(plan, notes):
        console.print(line, soft_wrap=True, highlight=False)
    for phase in plan.phases:
        console.print(f"\nGiB per GPU, {phase.name}: {in_words(phase.layout)}", highlight=False)
        console.print(_memory(plan, phase))
    console.print("\nseconds of a step")
    console.print(_times(plan))
    for line in _remarks(plan):
        console.print(line, soft_wrap=True, highlight=False)
    if answer.internal is not None:
        console.print(_own_layout(plan, answer.internal), soft_wrap=True, highlight=False)
    if found:
        console.print(f"\nlayouts of {plan.gpus} GPUs that fit, by the full policy's step")
        console.print(_proposals(plan, found))
    console.print(verdict(plan), soft_wrap=True, highlight=False, style="bold")


def _own_layout(plan: Plan, other: Plan) -> str:
    """What the internal phases would gain."""
    own, now = other.phases[0], plan.phases[0]
    layout = other.recipe.config.bupo.internal_layout
    assert layout is not None
    settings = {"tp": layout.tp, "sp": layout.sp, "distributed_optimizer": True}
    if layout.ep > 1:
        settings |= {"ep": layout.ep, "etp": layout.etp}
    written = as_settings({f"bupo.internal_layout.{k}": v for k, v in settings.items()})
    return (
        f"the {own.name} under a layout of its own ({in_words(own.layout)}) would train in "
        f"{_seconds(own.time.train_s)} instead of {_seconds(now.time.train_s)}: {written}"
    )


def verdict(plan: Plan) -> str:
    """One line."""
    where = f"{plan.gpus} x {plan.hardware.name}"
    if not plan.fits:
        return f"does not fit {where}: {'; '.join(plan.problems)}"
    full, memory = plan.full.time.total_s, plan.peak_bytes / GIB
    said = f"fits {where}: at most {memory:.1f} of {plan.hardware.gpu.memory_gib:g} GiB"
    internal = [phase for phase in plan.phases[:-1] if phase.steps]
    steps = f"{_seconds(full)} a step"
    if internal:
        share = internal[0].time.train_s / plan.full.time.train_s
        steps += f", {_seconds(internal[0].time.total_s)} in the internal phase"
        steps += f" (training {share:.0%} of the full policy's)"
    hours = sum(phase.steps * phase.time.total_s for phase in plan.phases) / 3600
    return f"{said}; {steps}; {hours:.0f} hours in all"


def in_words(layout: Layout) -> str:
    """The sizes of a layout."""
    sizes = f"tp {layout.tp} x pp {layout.pp}"
    sizes += f" x cp {layout.cp}" if layout.cp > 1 else ""
    sizes += f" x dp {layout.dp}"
    sizes += f", vpp {layout.vpp}" if layout.vpp > 1 else ""
    if layout.ep > 1:
        sizes += f", ep {layout.ep} x etp {layout.etp or layout.tp}"
    return sizes


def _head(plan: Plan, notes: Sequence[str]) -> Iterator[str]:
    recipe, work = plan.recipe, plan.recipe.work
    arch = recipe.policy
    yield f"{all_parameters(arch) / 1e9:.2f} billion parameters in {arch.layers} layers"
    yield from notes
    rollout = recipe.config.rollout
    yield (
        f"a step: {work.prompts} prompts of {work.prompt_tokens:g} tokens x "
        f"{rollout.responses_per_prompt} responses of {work.response_tokens:g} in the mean (at "
        f"most {work.longest_response}), {recipe.config.algorithm.minibatches} updates"
    )
    kind = "shared with the trainer" if plan.shares_gpus else "of their own"
    if plan.serving.engine == "sglang":
        tp = recipe.config.sglang.get("tp_size", 1)
        yield (
            f"servers: {plan.serving.replicas} replicas of {tp} GPUs, {kind}: "
            f"{plan.serving.weights / GIB:.1f} GiB of weights and "
            f"{plan.serving.cache / GIB:.1f} GiB for {plan.serving.cache_tokens} tokens on each, "
            f"{plan.serving.sequences:.0f} responses at a time"
        )


def _memory(plan: Plan, phase: Phase) -> Table:
    """A column for each stage."""
    stages = _stages(plan, phase)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for stage in stages:
        table.add_column(str(stage.stage), justify="right")
    table.add_row("layers", *(str(stage.layers) for stage in stages))
    table.add_row("parameters, M", *(f"{stage.parameters / 1e6:.0f}" for stage in stages))
    for name in CATEGORIES:
        values = [getattr(stage, name) / GIB for stage in stages]
        if any(values):
            table.add_row(name.replace("_", "-"), *(f"{value:.2f}" for value in values))
    for name, bytes_of in (
        ("while it trains", plan.of_training),
        ("while it generates", plan.of_rollouts),
        ("while weights go over", plan.of_sync),
    ):
        cells = (f"{bytes_of(stage) / GIB:.1f}" for stage in stages)
        table.add_row(name, *cells, style="bold")
    return table


def _stages(plan: Plan, phase: Phase) -> list[StageMemory]:
    """All of them, or of many the first, the last and the fullest."""
    stages = phase.stages
    if len(stages) <= STAGES_SHOWN:
        return list(stages)
    fullest = max(stages, key=plan.of_training)
    return [s for s in stages if s.stage in {0, fullest.stage, len(stages) - 1}]


def _times(plan: Plan) -> Table:
    """A column for each phase."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("phase")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    times = [phase.time for phase in plan.phases]
    for name, values in (
        ("generate", [t.generate_s for t in times]),
        ("old log-probs", [t.old_logprobs_s for t in times]),
        ("forward and backward", [t.update_s for t in times]),
        ("critic", [t.critic_s for t in times]),
        ("optimizer", [t.optimizer_s for t in times]),
        ("gradients, parameters", [t.exchange_s for t in times]),
        ("weight sync", [t.sync_s for t in times]),
        ("a step", [t.total_s for t in times]),
        ("  idle in the pipeline", [t.bubble_s for t in times]),
        ("  in TP, CP, EP", [t.tensor_s for t in times]),
    ):
        if any(values):
            style = "bold" if name == "a step" else None
            table.add_row(name, *(f"{value:.1f}" for value in values), style=style)
    speeds = (plan.tokens_per_s_per_gpu(phase) for phase in plan.phases)
    table.add_row("tokens/s/GPU", *(f"{speed:.0f}" for speed in speeds))
    used = (plan.flops_used(phase) for phase in plan.phases)
    table.add_row("training's share of peak", *(f"{share:.0%}" for share in used))
    return table


def _remarks(plan: Plan) -> Iterator[str]:
    config, rates = plan.recipe.config, plan.hardware
    if plan.full.time.overlapped:
        yield "full-policy steps generate while they train: a step is as long as the longer of both"
    if config.algorithm.kl_coefficient:
        most = max(stage.weights for stage in plan.full.stages)
        yield f"reference weights: {most / GIB:.1f} GiB of host memory per GPU"
    layers = "torch's own modules" if rates.plain_layers else "Transformer Engine's modules"
    products = rates.gpu.matmul * rates.efficiency.matmul
    yield (
        f"assumed: {products:.0%} of {rates.name}'s peak in products, "
        f"{rates.efficiency.memory:.0%} of its memory rate, {rates.efficiency.link:.0%} of links, "
        f"layers of {layers}, memory for responses of full length, time for those of mean length; "
        f"all rates: {rates.source}"
    )


def _proposals(plan: Plan, found: Sequence[Proposal]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("step, s", "internal", "GiB", "layout", "settings that differ"):
        left = heading in {"layout", "settings that differ"}
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for proposal in found:
        phases = proposal.plan.phases
        differs = as_settings(what_differs(plan.recipe.config, proposal.changes))
        differs = differs.replace(" ", "\n")
        table.add_row(
            f"{phases[-1].time.total_s:.1f}",
            f"{phases[0].time.total_s:.1f}" if len(phases) > 1 else "-",
            f"{proposal.plan.peak_bytes / GIB:.1f}",
            in_words(proposal.plan.full.layout),
            differs or "none: the recipe's own",
        )
    return table


def as_json(answer: Answer) -> str:
    """All of it. Bytes, seconds, counts; keys stay as they are, new ones may come."""
    return json.dumps(_record(answer), indent=2) + "\n"


def _record(answer: Answer) -> dict[str, Any]:
    plan, notes, found = answer.plan, answer.notes, answer.proposals
    own = answer.internal
    return {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "problems": list(plan.problems),
        "gpu": plan.hardware.name,
        "gpus": plan.gpus,
        "memory_bytes": plan.hardware.memory_bytes,
        "peak_bytes": plan.peak_bytes,
        "parameters": all_parameters(plan.recipe.policy),
        "notes": list(notes),
        "workload": asdict(plan.recipe.work),
        "phases": [_phase_record(plan, phase) for phase in plan.phases],
        "serving": asdict(plan.serving) | {"shares_gpus": plan.shares_gpus},
        "internal_layout": None if own is None else _phase_record(own, own.phases[0]),
        "hardware": asdict(plan.hardware),
        "proposals": [
            {
                "settings": dict(proposal.changes),
                "layout": asdict(proposal.plan.full.layout),
                "peak_bytes": proposal.plan.peak_bytes,
                "step_s": proposal.plan.full.time.total_s,
                "internal_step_s": [p.time.total_s for p in proposal.plan.phases[:-1]],
            }
            for proposal in found
        ],
    }


def _phase_record(plan: Plan, phase: Phase) -> dict[str, Any]:
    times = asdict(phase.time)
    times |= {"train_s": phase.time.train_s, "total_s": phase.time.total_s}
    stages = [
        asdict(stage)
        | {
            "training_bytes": plan.of_training(stage),
            "generating_bytes": plan.of_rollouts(stage),
            "sync_bytes": plan.of_sync(stage),
        }
        for stage in phase.stages
    ]
    return {
        "name": phase.name,
        "depth": phase.depth,
        "steps": phase.steps,
        "layout": asdict(phase.layout),
        "stages": stages,
        "time": times,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu(phase),
        "model_flops_utilization": plan.flops_used(phase),
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
