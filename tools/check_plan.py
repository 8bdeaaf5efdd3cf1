"""Is a plan true? Real trainers on forked ranks, their memory counted, beside what was planned.

    python tools/check_plan.py --json checked.json

A random model trains one update under each layout on this machine's CPU. What its ranks hold is
added up tensor by tensor: parameters, gradient buffers, optimizer states. What an update allocates
beyond that at its peak is counted by torch's profiler, which sees every allocation. The plan is
made with the rates of `--gpu CPU`, whose layers are torch's own modules, as they are here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the measuring is a module of its own

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config import Config, load_config
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.phase_actor import plan_actor
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.planner.counts import stage_parameters
from megatron_bupo.planner.hardware import read_hardware
from megatron_bupo.planner.memory import Actor, passes, static_bytes
from megatron_bupo.planner.workload import workload_of
from megatron_bupo.types import TokenBatch
from tools.phase_cost import peak_of

TOLERATED = 0.10  # of what is measured
RECOMPUTE = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)
SHARDED = "parallel.distributed_optimizer=true"
CASES: dict[str, tuple[str, ...]] = {
    "one rank": (),
    "one rank, bf16": ("model.dtype=bfloat16",),
    "recompute": RECOMPUTE,
    "internal layer 2": ("bupo.target_layer=2", "bupo.internal_steps=1"),
    "tp 2, sp": ("parallel.tp=2", "parallel.sp=true"),
    "pp 2": ("parallel.pp=2",),
    "pp 2, recompute": ("parallel.pp=2", *RECOMPUTE),
    "dp 2, sharded": ("parallel.dp=2", SHARDED),
    "dp 2, sharded, bf16": ("parallel.dp=2", SHARDED, "model.dtype=bfloat16"),
    "experts, one rank": (),
    "experts, ep 2, sharded": ("parallel.dp=2", "parallel.ep=2", SHARDED),
}
RESPONSES, PROMPT, RESPONSE = 8, 64, 192  # tokens of each, all of full length
SETTINGS = (
    "data.train=none",
    f"data.max_prompt_tokens={PROMPT}",
    f"rollout.max_response_tokens={RESPONSE}",
    f"rollout.prompts_per_step={RESPONSES}",
    "rollout.responses_per_prompt=1",
    "algorithm.minibatches=1",
    "trainer.max_tokens_per_microbatch=512",
    "trainer.logprob_chunk_tokens=128",
)
CATEGORIES = ("weights", "gradients", "optimizer", "passes")


@dataclass(frozen=True)
class Checked:
    """A category of a layout's ranks of one pipeline stage; bytes."""

    case: str
    stage: int
    category: str
    planned: float
    measured: float

    @property
    def off(self) -> float:
        """The plan's error, as a share of what is measured."""
        return self.planned / self.measured - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases, tell, and say whether any is off by more than is tolerated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--only", metavar="CASE", action="append", help="one of the cases")
    args = parser.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or CASES:
            found += check_case(name, Path(folder))
    show(found, Console(width=None if sys.stdout.isatty() else 130))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    return int(any(abs(row.off) > TOLERATED for row in found))


def check_case(name: str, folder: Path) -> list[Checked]:
    """The layout `name` of `CASES`, measured and planned."""
    model = write_model(folder, experts=name.startswith("experts"))
    config = load_config(None, [f"model.path={model}", *SETTINGS, *CASES[name]])
    layout = parallel_sizes(config, None)
    out = folder / f"{name}.json"
    # In a process of its own: a single rank would leave threads behind, and forks want none
    process = multiprocessing.get_context("fork").Process(
        target=run_ranks, args=(measure, layout.world, config, out)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: see above")
    measured = json.loads(out.read_text())
    return [
        Checked(name, stage, category, planned, measured[stage][category])
        for stage, plan in enumerate(planned_bytes(config))
        for category, planned in zip(CATEGORIES, plan, strict=True)
    ]


def planned_bytes(config: Config) -> list[tuple[float, ...]]:
    """For each stage, by category."""
    hardware, work = read_hardware("CPU"), workload_of(config)
    actor = Actor(read_architecture(config.model.path), config, parallel_sizes(config, None))
    depth = next((layer for layer, _ in config.bupo.phases()), actor.arch.layers)
    found = []
    for stage in actor.stages:
        static = static_bytes(stage_parameters(actor.arch, stage, actor.layout), actor)
        dynamic = sum(passes(actor, stage, work, hardware, depth=depth))
        found.append((static.weights, static.gradients, static.optimizer, dynamic))
    return found


def measure(config: Config, out: Path) -> None:
    """On each rank: train an update; the largest of each stage's ranks go to `out`."""
    policy = next((InternalLayerPolicy(n) for n, _ in config.bupo.phases()), FULL)
    arch = read_architecture(config.model.path)
    plan = plan_actor(FULL, arch, config, parallel_sizes(config, None).world)
    with parallel.joined(plan.layout, seed=0):
        trainer, batch = plan.build(), random_batch(arch.vocab_size)
        peaks: list[float] = []
        run: Any = trainer._run

        def counted(*args: Any, **kwargs: Any) -> Any:
            result, peak = peak_of(lambda: run(*args, **kwargs))
            peaks.append(peak)
            return result

        for attempt in range(2):  # the first one makes what stays
            if attempt:
                trainer._run = counted  # type: ignore[method-assign]
            old, _ = trainer.logprobs(batch, policy)
            peaks.clear()
            trainer.update(batch.with_old_logprobs(old), policy, lr=1e-6)
        trainer._run = run  # type: ignore[method-assign]
        mine = held_bytes(trainer) | {"passes": peaks[-1]}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            stages = [
                [everyone[r] for r in plan.layout.stage_ranks(s)] for s in range(plan.layout.pp)
            ]
            worst = [{c: max(rank[c] for rank in ranks) for c in CATEGORIES} for ranks in stages]
            out.write_text(json.dumps(worst))


def held_bytes(trainer: MegatronTrainer) -> dict[str, float]:
    """What this rank holds for good, each storage once, by category."""
    seen: set[int] = set()

    def bytes_of(tensors: list[Any]) -> float:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    weights = bytes_of([p for chunk in trainer.wrapped for p in chunk.parameters()])
    buffers = [b for c in trainer.wrapped for b in (*c.buffers, *c.expert_parallel_buffers)]
    gradients = bytes_of([buffer.grad_data for buffer in buffers])
    optimizer = 0.0
    for inner in trainer.optimizer._unit_of:
        stepped = [p for group in inner.param_groups for p in group["params"]]
        optimizer += bytes_of([t for p in stepped for t in (p, *inner.state[p].values())])
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def write_model(folder: Path, *, experts: bool) -> Path:
    """A random Qwen3 whose layers are large beside the bookkeeping of tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    path = folder / ("experts" if experts else "dense")
    if path.exists():
        return path
    logging.disable_progress_bar()
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = AutoConfig.for_model(
        "qwen3_moe" if experts else "qwen3",
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **(more if experts else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def random_batch(vocabulary: int) -> TokenBatch:
    """Responses of full length."""
    tokens = PROMPT + RESPONSE
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (RESPONSES, tokens), generator=generator)
    mask = (torch.arange(tokens) >= PROMPT).expand_as(ids)
    advantages = torch.randn(RESPONSES, 1, generator=generator) * mask
    return TokenBatch(ids, mask, torch.zeros(ids.shape), advantages)


def show(found: Sequence[Checked], console: Console) -> None:
    """Planned against measured."""
    table = Table("layout", "stage", title="planned / measured, MB")
    for category in CATEGORIES:
        table.add_column(category, justify="right", no_wrap=True)
    for case, stage in dict.fromkeys((row.case, row.stage) for row in found):
        rows = [row for row in found if (row.case, row.stage) == (case, stage)]
        cells = (f"{r.planned / 1e6:.2f} / {r.measured / 1e6:.2f} ({r.off:+.1%})" for r in rows)
        table.add_row(case, str(stage), *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
