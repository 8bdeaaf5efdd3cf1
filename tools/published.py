"""How far is the planner from what others have measured? A table of published points.

    python tools/published.py

Each point is planned from its published settings with the rates of hardware.yaml: the same formulas
and the same table for all of them. Others run other software (tuned kernels, overlapped
collectives, vLLM), so a ratio says how far a plan is to be trusted, not who is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as tests and other tools do

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.planner.changes import RECOMPUTE, as_settings
from megatron_bupo.planner.hardware import read_hardware
from megatron_bupo.planner.known_models import MODELS
from megatron_bupo.planner.memory import Actor
from megatron_bupo.planner.plan import Recipe, make_plan
from megatron_bupo.planner.serving import decode_step_s
from megatron_bupo.planner.timing import Clock, sync_seconds
from megatron_bupo.planner.workload import Workload, workload_of

FULL = tuple(as_settings(RECOMPUTE).split())
SELECTIVE = "megatron.recompute_granularity=selective"
FLEX = "megatron.moe_token_dispatcher_type=flex"
ENDS_COUNT = (
    "megatron.account_for_embedding_in_pipeline_split=true",
    "megatron.account_for_loss_in_pipeline_split=true",
)
SHARED, OWN = "rollout.colocated=true", "rollout.max_staleness=1"

DGXC = "NVIDIA/dgxc-benchmarking, llama3.1 (NeMo 24.09)"
KORTHIKANTI = "arXiv 2205.05198, table 5"
QWEN_MOE = "NVIDIA/Megatron-LM pull 5728"
NEMO_RL = "NeMo-RL, performance-summary.md"
ENERGY = "leadgreen/green-token-index (vLLM)"
SWEEPS = "tenstorrent/tt-inference-server issue 340 (vLLM)"
VERL = "verl, delta_weight_sync.md, NCCL"
SLIME = "Awesome-ML-SYS-Tutorial issue 169, slime"


@dataclass(frozen=True)
class Point:
    """What somebody measured, and the same by the planner; seconds."""

    what: str
    measured: float
    planned: float
    source: str

    @property
    def ratio(self) -> float:
        """Above 1: the plan is slower than what was measured."""
        return self.planned / self.measured


@dataclass(frozen=True)
class Pretraining:
    """An optimizer step of `sequences` of `tokens`, each a micro-batch."""

    arch: Architecture
    gpu: str
    gpus: int
    sequences: int
    tokens: int
    settings: tuple[str, ...]

    def seconds(self) -> float:
        """By the planner."""
        budget = f"trainer.max_tokens_per_microbatch={self.tokens}"
        config = config_of("x", "algorithm.minibatches=1", budget, *self.settings)
        clock = self._clock(config, self.gpus)
        return clock.learning().total_s + sum(clock.optimizer_s())

    def flops(self) -> float:
        """Of the model, half of the scores, as Megatron-LM counts them."""
        config = config_of("x", "algorithm.minibatches=1")
        return self._clock(config, 1).learning().flops

    def _clock(self, config: Config, gpus: int) -> Clock:
        full = Workload(self.sequences, self.sequences, 0.0, self.tokens, self.tokens, self.tokens)
        actor = Actor(self.arch, config, parallel_sizes(config, gpus))
        return Clock(actor, full, read_hardware(self.gpu), self.arch.layers)


@dataclass(frozen=True)
class Step:
    """A GRPO step of 64 prompts x 32 responses on H100s, at most 4096 tokens long and `mean` in the
    mean. Prompts of 100 tokens are assumed, and that policy and reference score, as NeMo-RL's
    defaults have it.
    """

    model: str
    mean: int
    settings: tuple[str, ...]

    def seconds(self) -> float:
        """By the planner."""
        config = config_of(
            self.model,
            "rollout.engine=sglang",
            "algorithm.kl_coefficient=0.01",
            "data.max_prompt_tokens=100",
            "rollout.max_response_tokens=3996",
            "rollout.prompts_per_step=64",
            "rollout.responses_per_prompt=32",
            "algorithm.minibatches=4",
            "trainer.max_tokens_per_microbatch=4096",
            "sglang.mem_fraction_static=0.6",
            *self.settings,
        )
        work = workload_of(config, prompt_tokens=100, response_tokens=self.mean - 100)
        recipe = Recipe(config, known(self.model), None, work)
        plan = make_plan(recipe, read_hardware("H100"), parallel_sizes(config, None))
        return plan.full.time.total_s


def main() -> None:
    """Print the table."""
    print("\n".join(table()))


def table() -> Iterator[str]:
    """In Markdown."""
    yield "| what | measured | planned | ratio | source |"
    yield "|---|---:|---:|---:|---|"
    for point in points():
        seconds = f"{in_words(point.measured)} | {in_words(point.planned)}"
        yield f"| {point.what} | {seconds} | {point.ratio:.2f} | {point.source} |"


def in_words(seconds: float) -> str:
    """With a unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def points() -> Iterator[Point]:
    """All of them."""
    yield from pretraining_points()
    yield from step_points()
    yield from decode_points()
    yield from sync_points()


def pretraining_points() -> Iterator[Point]:
    """Of Megatron-LM and what is built on it."""
    many = of(tp=4, pp=4, cp=2, vpp=5)
    for what, run, seconds, source in (
        ("Llama-3.1-8B", trained("Llama-3.1-8B", 8, 128, 8192, *of(cp=2)), 12.91, DGXC),
        ("Llama-3.1-70B", trained("Llama-3.1-70B", 64, 128, 8192, *many), 14.72, DGXC),
        ("GPT 22B", gpt(6144, 48, 8, 4, *of(tp=8)), 1.10, KORTHIKANTI),
        ("GPT 175B", gpt(12288, 96, 64, 64, *of(tp=8, pp=8, vpp=3)), 13.75, KORTHIKANTI),
    ):
        on = f"{run.gpus} {run.gpu}"
        yield Point(f"pretraining {what}, {on}", seconds, run.seconds(), source)
    large = of(tp=2, pp=8, vpp=4, ep=32)
    for run, tflops, what in (
        (trained("Qwen3-30B-A3B", 16, 1024, 4096, FLEX, *of(ep=16)), 240.5, "Qwen3-30B-A3B"),
        (trained("Qwen3-235B-A22B", 256, 8192, 4096, *ENDS_COUNT, *large), 302, "Qwen3-235B-A22B"),
    ):
        seconds = run.flops() / (1e12 * tflops * run.gpus)
        yield Point(f"pretraining {what}, {run.gpus} H100", seconds, run.seconds(), QWEN_MOE)


def step_points() -> Iterator[Point]:
    """Of NeMo-RL, with vLLM."""
    dense = of(tp=4, pp=4, dp=2)
    for where, version, seconds, step in (
        ("16 H100, on-policy", "v0.4", 97.7, small(1060, SHARED, 16, *of(pp=2, dp=8))),
        ("16 H100, 1 step off", "v0.4", 74.6, small(1129, OWN, 8, *of(pp=2, dp=4))),
        (
            "32 H100, on-policy",
            "v0.4",
            393,
            Step("Qwen3-32B", 3206, (SHARED, *served(8, 4), *dense)),
        ),
        ("64 H100, 1 step off", "v0.4", 215, Step("Qwen3-32B", 3207, (OWN, *served(8, 4), *dense))),
        ("32 H100, on-policy", "v0.6", 192, experts(3203, SHARED, 16, *of(dp=32, ep=8))),
        ("32 H100, 1 step off", "v0.6", 152, experts(3201, OWN, 8, *of(pp=2, dp=8, ep=8))),
    ):
        what = f"GRPO step, {step.model}, {where}"
        yield Point(what, seconds, step.seconds(), f"{NEMO_RL}, {version}")


def decode_points() -> Iterator[Point]:
    """A token of each of a batch; where prompts' lengths are not published, a mean of 500 tokens to
    look back at is assumed.
    """
    for model, gpu, batch, context, ms, source in (
        ("Qwen3-1.7B", "A100", 1, 640, 4.7, SWEEPS),
        ("Qwen3-14B", "A100", 1, 640, 28.2, SWEEPS),
        ("Qwen3-30B-A3B", "A100", 1, 640, 9.7, SWEEPS),
        ("Llama-3.1-8B", "H100", 511, 500, 47.4, ENERGY),
        ("Llama-3.1-8B", "B200", 2043, 500, 124.9, ENERGY),
        ("Qwen3-8B", "B200", 1427, 500, 91.2, ENERGY),
        ("Qwen3-14B", "B200", 2045, 500, 112.6, ENERGY),
        ("Qwen3-30B-A3B", "B200", 1023, 500, 88.7, ENERGY),
    ):
        arch, hardware = known(model), read_hardware(gpu)
        planned = decode_step_s(arch, hardware, batch=batch, context=context, tp=1)
        what = f"decoding {batch} tokens, {model}, 1 {gpu}"
        yield Point(what, 1e-3 * ms, planned, source)


def sync_points() -> Iterator[Point]:
    """To servers on nodes of their own, from one pipeline stage."""
    for model, seconds, source in (("Qwen2.5-72B", 28.7, VERL), ("Qwen3-30B-A3B", 16, SLIME)):
        arch = known(model)
        config = config_of(model, "rollout.engine=sglang", *of(tp=4))
        actor = Actor(arch, config, parallel_sizes(config, None))
        planned = sync_seconds(actor, read_hardware("H100"), arch.layers)
        yield Point(f"weight sync, {model}", seconds, planned, source)


def trained(model: str, gpus: int, sequences: int, tokens: int, *settings: str) -> Pretraining:
    """On H100s."""
    return Pretraining(known(model), "H100", gpus, sequences, tokens, settings)


def gpt(hidden: int, layers: int, gpus: int, sequences: int, *settings: str) -> Pretraining:
    """A GPT-3 on A100s: as many multiplications as a gated MLP of 8/3 of the hidden size."""
    heads = {"heads": hidden // 128, "kv_heads": hidden // 128, "head_dim": 128}
    sizes = {"hidden_size": hidden, "layers": layers, "ffn_size": 8 * hidden // 3}
    arch = replace(known("Llama-3.1-8B"), vocab_size=51200, **sizes, **heads)
    return Pretraining(arch, "A100", gpus, sequences, 2048, (SELECTIVE, *settings))


def small(mean: int, where: str, servers: int, *settings: str) -> Step:
    """Llama-3.1-8B."""
    return Step("Llama-3.1-8B", mean, (where, *served(servers, 1), *FULL, *settings))


def experts(mean: int, where: str, servers: int, *settings: str) -> Step:
    """Qwen3-30B-A3B."""
    return Step("Qwen3-30B-A3B", mean, (where, *served(servers, 2), *settings))


def served(count: int, tp: int) -> tuple[str, ...]:
    """Settings of servers."""
    return f"servers.count={count}", f"sglang.tp_size={tp}"


def of(**sizes: int) -> tuple[str, ...]:
    """Settings of a layout."""
    more = ["parallel.etp=1"] if "ep" in sizes else []
    more += ["parallel.sp=true"] if "tp" in sizes else []
    return (*(f"parallel.{name}={size}" for name, size in sizes.items()), *more)


def known(model: str) -> Architecture:
    """Of the planner's models."""
    return read_architecture(MODELS / model)


def config_of(model: str, *settings: str) -> Config:
    """In bf16, with a sharded optimizer."""
    always = ("data.train=none", "model.dtype=bfloat16", "parallel.distributed_optimizer=true")
    return load_config(None, [f"model.path={model}", *always, *settings])


if __name__ == "__main__":
    main()
