"""How far does a recipe scale, says the planner? Writes examples/scaling.md.

    python tools/scaling_page.py > examples/scaling.md

Half of the GPUs train and half serve; for each number the fastest layout that the planner finds.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as tests and other tools do

from megatron_bupo.commands.plan import recipe_of
from megatron_bupo.planner.hardware import GIB, Hardware, read_hardware
from megatron_bupo.planner.plan import Plan, Recipe
from megatron_bupo.planner.propose import proposals
from megatron_bupo.planner.report import in_words
from tools import published

CONF = Path(__file__).parents[1] / "conf"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
LARGE = {  # GPUs
    "bupo_llama3_3_70b": 64,
    "bupo_qwen2_5_72b": 64,
    "bupo_qwen3_32b": 32,
    "bupo_qwen3_30b_a3b": 32,
}
RECIPES = {"bupo_llama3_3_70b": 8, "bupo_qwen3_30b_a3b": 2}  # GPUs of a server
HEAD = """\
# How recipes scale, by the planner

Written by `python tools/scaling_page.py > examples/scaling.md`. Nothing here was run on a GPU:
these are plans, with the rates and efficiencies of `megatron_bupo/planner/hardware.yaml`
({matmul:.0%} of an H100's peak in products, {memory:.0%} of its memory rate, {link:.0%} of NVLink
and of one {network:g} GB/s port per GPU). They leave out what no arithmetic knows: stragglers,
graders, disks.

Half of the GPUs train and half serve. A step's work stays the same, {work}, so this is
strong scaling: with more GPUs each has less to do, the longest response bounds generation, and
tokens per second and GPU fall. The layout is the fastest that fits. In the full policy's phase
servers generate one step ahead; the internal phase is on-policy and waits for both. "Training"
is the trainer's time alone, "share of peak" the model's FLOPs meanwhile, recomputation left out.
"""
OWN_OR_SHARED = """\
## Servers on nodes of their own, or beside the trainer?

As many GPUs either way, the fastest layout that fits for each. With nodes of their own, servers
generate the next step's responses while the trainer trains (`rollout.max_staleness=1`); beside it
(`rollout.colocated=true`, `sync.mode=ipc`) they take turns, every response is on-policy, and all
GPUs do both; "layout" and "memory" (`sglang.mem_fraction_static`) are theirs. A model that trains
for long gains by the first; the internal phase, on-policy either way, by the second.

| recipe | GPUs | own nodes: full, internal, s | shared: full, internal, s | layout | memory |
|---|---:|---:|---:|---|---:|"""
COMPARED = """\
## Beside what others have measured

`python tools/published.py` plans published runs from their published settings, with the same rates
for all. A ratio below 1 says that the plan is faster than what was measured.

{table}

What to make of it: dense pretraining is within a fifth. Where others hide the shuffling of tokens
to experts behind computing (Qwen3-235B-A22B), plans are slower, for it is not hidden here. Decoding
is planned a sixth too fast, batches on experts by more. Whole steps come out a quarter to a third
shorter than NeMo-RL's, which has more in them than the planner knows (stragglers, offloading,
waking servers, data): add that to a plan. `decode_sequence_ms` and `bucket_ms` were set by what
these points leave unexplained; every other rate has a source of its own or is an assumption that
`hardware.yaml` names. verl's shares of peak for Qwen3-30B-A3B (0.40, 0.37, 0.31 on 8, 16, 32 GPUs)
are left out: neither GPU nor lengths are published with them.
"""


def main() -> None:
    """Print the page."""
    hardware, first = read_hardware("H100"), recipe("bupo_llama3_3_70b")
    efficiency, work = hardware.efficiency, first.work
    print(
        HEAD.format(
            matmul=hardware.gpu.matmul * efficiency.matmul,
            memory=efficiency.memory,
            link=efficiency.link,
            network=hardware.node.network_gb_per_s,
            work=f"{work.responses} responses",
        )
    )
    for name, each in RECIPES.items():
        print("\n".join(table(name, each, hardware)), "\n")
    print("\n".join(own_or_shared(hardware)), "\n")
    print(COMPARED.format(table="\n".join(published.table())), end="")


def recipe(name: str, *overrides: str) -> Recipe:
    """Of conf/."""
    path = CONF / f"{name}.yaml"
    asked = {"recipe": str(path), "overrides": list(overrides)}
    return recipe_of(Namespace(**asked, prompt_tokens=None, response_tokens=None, gpus=None))[0]


def best(of: Recipe, gpus: int, each: int, hardware: Hardware) -> Plan | None:
    """The fastest plan on `gpus`, half of them servers of `each`."""
    config = of.config
    servers = replace(config.servers, count=max(1, gpus // 2 // each))
    parallel = replace(config.parallel, dp=None)
    half = replace(of, config=replace(config, servers=servers, parallel=parallel))
    found = next(proposals(half, hardware, gpus), None)
    return found and found.plan


def table(name: str, each: int, hardware: Hardware) -> Iterator[str]:
    """A line for each number of GPUs."""
    of = recipe(name)
    yield f"## {of.config.model.path.rpartition('/')[2]} (`conf/{name}.yaml`)\n"
    yield (
        "| GPUs | trainer's layout | full step, s | internal step, s | training: full, internal, s "
        "| tokens/s/GPU | share of peak | GiB at most |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|"
    for gpus in GPUS:
        plan = best(of, gpus, each, hardware)
        if plan is None:
            yield f"| {gpus} | none fits | | | | | | |"
            continue
        full, internal = plan.full, plan.phases[0]
        yield (
            f"| {gpus} | {in_words(full.layout)} | {full.time.total_s:.0f} "
            f"| {internal.time.total_s:.0f} "
            f"| {full.time.train_s:.1f}, {internal.time.train_s:.1f} "
            f"| {plan.tokens_per_s_per_gpu(full):.0f} | {plan.flops_used(full):.0%} "
            f"| {plan.peak_bytes / GIB:.1f} |"
        )


def own_or_shared(hardware: Hardware) -> Iterator[str]:
    """A line for each large recipe."""
    yield OWN_OR_SHARED
    for name, gpus in LARGE.items():
        of = recipe(name)
        config = of.config
        own = next(proposals(of, hardware, gpus)).plan
        sizes = config.sglang.get("tp_size", 1)
        together = replace(
            config,
            rollout=replace(config.rollout, colocated=True, max_staleness=0),
            servers=replace(config.servers, count=gpus // sizes),
            sync=replace(config.sync, mode="ipc"),
            parallel=replace(config.parallel, dp=None),
        )
        shared = next(proposals(replace(of, config=together), hardware, gpus), None)
        if shared is None:
            yield f"| {name} | {gpus} | {_both(own)} | none fits | | |"
            continue
        fraction = shared.plan.recipe.config.sglang["mem_fraction_static"]
        layout = in_words(shared.plan.full.layout)
        yield f"| {name} | {gpus} | {_both(own)} | {_both(shared.plan)} | {layout} | {fraction} |"


def _both(plan: Plan) -> str:
    return f"{plan.full.time.total_s:.0f}, {plan.phases[0].time.total_s:.0f}"


if __name__ == "__main__":
    main()
