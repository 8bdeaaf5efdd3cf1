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

CONF = Path(__file__).parents[1] / "conf"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
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
COMPARED = """\
## Beside what others have published

- NeMo-RL, Qwen3-30B-A3B on 32 H100: 1102 tokens/s/GPU on-policy, 1414 one step off-policy. We do
  not know their lengths; with responses of 2048 tokens in the mean (at most 4096) and 64 prompts
  x 32 the planner says {on:.0f} and {off:.0f} for ours.
- verl, Qwen3-30B-A3B, share of peak in training: 0.40, 0.37, 0.31 on 8, 16, 32 GPUs. The planner
  says {mfu:.2f} for the 16 GPUs that train, of 32.
- NeMo-RL trains 70B models under TP4 x PP4 on 64 GPUs, the recipe's layout too. It has published
  no time for it that we know of, and we know no public 70B recipe with Megatron and SGLang.

These set arithmetic beside measurements of other software on other work. Generation comes out a
third faster than theirs, training of experts at half of theirs: the rates are uncalibrated.
"""


def main() -> None:
    """Print the page."""
    hardware, first = read_hardware("H100"), recipe("bupo_llama3_3_70b")
    efficiency, work = hardware.efficiency, first.work
    print(
        HEAD.format(
            matmul=efficiency.matmul,
            memory=efficiency.memory,
            link=efficiency.link,
            network=hardware.node.network_gb_per_s,
            work=f"{work.responses} responses",
        )
    )
    for name, each in RECIPES.items():
        print("\n".join(table(name, each, hardware)), "\n")
    print(compared(hardware), end="")


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
    return next((found.plan for found in proposals(half, hardware, gpus)), None)


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


def compared(hardware: Hardware) -> str:
    """The planner on others' settings."""
    theirs = (
        "rollout.max_response_tokens=4096",
        "rollout.prompts_per_step=64",
        "rollout.responses_per_prompt=32",
    )
    speeds = []
    for staleness in (0, 1):
        of = recipe("bupo_qwen3_30b_a3b", *theirs, f"rollout.max_staleness={staleness}")
        plan = best(of, 32, 2, hardware)
        assert plan is not None
        speeds.append(plan.tokens_per_s_per_gpu(plan.full))
    own = best(recipe("bupo_qwen3_30b_a3b"), 32, 2, hardware)
    assert own is not None
    return COMPARED.format(on=speeds[0], off=speeds[1], mfu=own.flops_used(own.full))


if __name__ == "__main__":
    main()
