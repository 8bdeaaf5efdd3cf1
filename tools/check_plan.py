"""Is a plan true? Real trainers on forked ranks, their memory counted, beside what was planned.

    python tools/check_plan.py

A random model trains one update under each layout on this machine's CPU. What its ranks hold is
added up tensor by tensor: parameters, gradient buffers, optimizer states. What an update allocates
beyond that at its peak is counted by torch's profiler, which sees every allocation. The plan is
made with the rates of `--gpu CPU`, whose layers are torch's own modules, as they are here.

"process" is the operating system's word: by how much a rank's resident set has grown at most, from
before its model is built, less the same with a small model under the same settings: what remains
are tensors, and not what an interpreter and its libraries take for themselves.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the measuring is a module of its own

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.planner.counts import stage_parameters
from megatron_bupo.planner.hardware import read_hardware
from megatron_bupo.planner.memory import Actor, passes, static_bytes
from megatron_bupo.planner.workload import workload_of
from tools import options
from tools.rank_memory import CATEGORIES, PROCESS, PROMPT, RESPONSE, RESPONSES, measure

HEAD = """\
# Plans beside the memory of real ranks

Written by `python tools/check_plan.py`: planned / measured, in MB.
Random Qwen3 models of 4 layers train an update in gloo ranks on a CPU; of a pipeline stage's ranks
the fullest is shown. "passes" is the most that an update allocates beside what is held for good;
"process" is by how much more the resident set of a rank's process grew with a larger model than
with a small one. The layers are torch's own modules, as everywhere on a CPU: those of Transformer
Engine have not been measured.
"""
TOLERATED = 0.10  # of what is measured
RECOMPUTE = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)
BLOCK = (RECOMPUTE[0], "megatron.recompute_method=block", "megatron.recompute_num_layers=2")
SELECTIVE = ("megatron.recompute_granularity=selective",)
INTERNAL = ("bupo.target_layer=2", "bupo.internal_steps=1")
LARGE = ("trainer.max_tokens_per_microbatch=2048", "trainer.logprob_chunk_tokens=512")
SHARDED = "parallel.distributed_optimizer=true"
BALANCED = (
    "megatron.moe_router_force_load_balancing=true"  # as a plan has it; random routers are not
)
CASES: dict[str, tuple[str, ...]] = {
    "one rank": (),
    "one rank, bf16": ("model.dtype=bfloat16",),
    "recompute": RECOMPUTE,
    "recompute, 2 layers at a time": (*RECOMPUTE[:2], "megatron.recompute_num_layers=2"),
    "recompute, a block of 2": BLOCK,
    "recompute core_attn": SELECTIVE,
    "recompute MLPs": (*SELECTIVE, "megatron.recompute_modules=[mlp]"),
    "internal layer 2": INTERNAL,
    "internal layer 2, own layout": (*INTERNAL, "parallel.pp=2", "bupo.internal_layout.tp=2"),
    "tp 2": ("parallel.tp=2",),
    "tp 2, sp": ("parallel.tp=2", "parallel.sp=true"),
    "cp 2": ("parallel.cp=2",),
    "pp 2": ("parallel.pp=2",),
    "pp 2, vpp 2": ("parallel.pp=2", "parallel.vpp=2"),
    "pp 2, recompute": ("parallel.pp=2", *RECOMPUTE),
    "pp 2, tied": ("parallel.pp=2",),
    "tp 2 x pp 2, sp": ("parallel.tp=2", "parallel.pp=2", "parallel.sp=true"),
    "dp 2, sharded": ("parallel.dp=2", SHARDED),
    "dp 2, sharded, bf16": ("parallel.dp=2", SHARDED, "model.dtype=bfloat16"),
    "experts, one rank": (BALANCED,),
    "experts, ep 2": (BALANCED, "parallel.dp=2", "parallel.ep=2"),
    "experts, ep 2, sharded": (BALANCED, "parallel.dp=2", "parallel.ep=2", SHARDED),
    "experts, tp 2, ep 2": (
        *(BALANCED, "parallel.tp=2", "parallel.sp=true"),
        *("parallel.ep=2", "parallel.etp=1"),
    ),
    "large": LARGE,
    "large, tp 2 x pp 2, sp": (*LARGE, "parallel.tp=2", "parallel.pp=2", "parallel.sp=true"),
    "large, dp 2, sharded, bf16": (*LARGE, "parallel.dp=2", SHARDED, "model.dtype=bfloat16"),
}
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
    parser = options.parser(__doc__)
    parser.add_argument("--only", metavar="CASE", action="append", help="one of the cases")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # forked ranks would wait for threads that stay here
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or CASES:
            found += check_case(name, Path(folder))
    print("\n".join(page(found)))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    return int(any(abs(row.off) > TOLERATED for row in found))


def check_case(name: str, folder: Path) -> list[Checked]:
    """The layout `name` of `CASES`, measured and planned."""
    config, measured = measured_bytes(name, folder, large=name.startswith("large"))
    plans = planned_bytes(config)
    rows = [
        Checked(name, stage, category, planned, measured[stage][category])
        for stage, plan in enumerate(plans)
        for category, planned in zip(CATEGORIES, plan, strict=True)
    ]
    if name.startswith("large"):
        small, of_small = measured_bytes(name, folder, large=False)
        for stage, (plan, less) in enumerate(zip(plans, planned_bytes(small), strict=True)):
            grown = measured[stage][PROCESS] - of_small[stage][PROCESS]
            rows.append(Checked(name, stage, PROCESS, sum(plan) - sum(less), grown))
    return rows


def measured_bytes(name: str, folder: Path, *, large: bool) -> tuple[Config, Any]:
    """The settings of a case and, by stage and category, what its ranks held."""
    model = write_model(folder, name, large=large)
    config = load_config(None, [f"model.path={model}", *SETTINGS, *CASES[name]])
    out = folder / f"{name}_{large}.json"
    # In a process of its own: a single rank would leave threads behind, and forks want none
    process = multiprocessing.get_context("fork").Process(
        target=run_ranks, args=(measure, parallel_sizes(config, None).world, config, out)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: see above")
    return config, json.loads(out.read_text())


def planned_bytes(config: Config) -> list[tuple[float, ...]]:
    """For each stage, by category."""
    hardware, work = read_hardware("CPU"), workload_of(config)
    actor, depth = actor_of(config)
    found = []
    for stage in actor.stages:
        static = static_bytes(stage_parameters(actor.arch, stage, actor.layout), actor)
        dynamic = sum(passes(actor, stage, work, hardware, depth=depth))
        found.append((static.weights, static.gradients, static.optimizer, dynamic))
    return found


def actor_of(config: Config) -> tuple[Actor, int]:
    """Who trains in the first phase, and to which depth."""
    whole = Actor(read_architecture(config.model.path), config, parallel_sizes(config, None))
    depth = next((layer for layer, _ in config.bupo.phases()), whole.arch.layers)
    return whole.of_phase(depth), depth


def write_model(folder: Path, case: str, *, large: bool) -> Path:
    """A random Qwen3 for a case, whose layers are large beside the bookkeeping of tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    experts, tied = case.startswith("experts"), case.endswith("tied")
    path = folder / f"experts_{experts}_tied_{tied}_large_{large}"
    if path.exists():
        return path
    logging.disable_progress_bar()
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    size = 4 if large else 1
    config = AutoConfig.for_model(
        "qwen3_moe" if experts else "qwen3",
        vocab_size=2048 * size,
        hidden_size=128 * size,
        intermediate_size=384 * size,
        num_hidden_layers=4,
        num_attention_heads=4 * size,
        num_key_value_heads=2 * size,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **(more if experts else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def page(found: Sequence[Checked]) -> Iterator[str]:
    """Planned against measured, in Markdown."""
    yield HEAD
    columns = [c for c in (*CATEGORIES, PROCESS) if any(row.category == c for row in found)]
    yield f"| case | stage | {' | '.join(columns)} |"
    yield f"|---|---:|{'---:|' * len(columns)}"
    for case, stage in dict.fromkeys((row.case, row.stage) for row in found):
        rows = {row.category: row for row in found if (row.case, row.stage) == (case, stage)}
        cells = (in_words(rows[name]) if name in rows else "" for name in columns)
        yield f"| {case} | {stage} | {' | '.join(cells)} |"
    worst = max(found, key=lambda row: abs(row.off))
    yield f"\nFarthest off: {worst.category} of {worst.case!r}, {worst.off:+.1%}."


def in_words(row: Checked) -> str:
    """A cell."""
    return f"{row.planned / 1e6:.2f} / {row.measured / 1e6:.2f} ({row.off:+.1%})"


if __name__ == "__main__":
    sys.exit(main())
