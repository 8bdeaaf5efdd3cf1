"""Where does a step of the demo go: generating, grading, old log-probs, updates, weight sync?

    python tools/bench_step.py --json step.json

The demo's run, steps of its internal phase and then of the full policy, on one process, on two
pipeline stages and on two tensor-parallel ranks. The layouts take turns, so that whatever else the
machine does meets all of them alike, and medians over steps are compared. CPU seconds are those of
all ranks together: they tell of the work even where the ranks had to wait for busy cores.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_bupo.bed.prepare import make_bed
from megatron_bupo.build import build
from megatron_bupo.config import load_config
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.preflight import Preflight, preflight
from megatron_bupo.record.metrics import read_metrics
from megatron_bupo.train import train_step
from tools import options

DEMO = Path(__file__).parents[1] / "conf" / "demo.yaml"
LAYOUTS = {  # two stages need several micro-batches to a minibatch, to keep both busy
    "1 rank": ("parallel.pp=1", "trainer.microbatch_size=64"),
    "pp 2": ("parallel.pp=2", "trainer.microbatch_size=16"),
    "tp 2": ("parallel.pp=1", "parallel.tp=2", "trainer.microbatch_size=64"),
}
WARM_UP = 2  # steps of each phase that are not counted
PARTS = ("generate", "grade", "old_logprobs", "update", "sync")  # then all the rest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the layouts in turn, and tell what came out."""
    args = parse(argv)
    make_bed(args.bed)
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(args.rounds):
            for i, (name, layout) in enumerate(LAYOUTS.items()):
                run_dir = Path(folder, f"{round_}-{i}")
                steps += [{"layout": name} | s for s in timed_steps(run_dir, layout, args)]
    rows = medians(steps)
    console = Console()
    for policy in dict.fromkeys(row["policy"] for row in rows):
        console.print(as_table(policy, [row for row in rows if row["policy"] == policy]))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=8, help="of each phase and round; default: %(default)s"
    )
    options.add_bed(parser)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def timed_steps(
    run_dir: Path, layout: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds of each part of each step of one run, in processes of its own."""
    in_each_phase = WARM_UP + args.steps
    schedule = (f"bupo.internal_steps={in_each_phase}", f"steps={2 * in_each_phase}")
    paths = (f"model.path={args.bed}/model", f"data.train={args.bed}/train.jsonl", "prepare=null")
    own = ("data.eval=null", "evaluation.every=0", f"run_dir={run_dir}")
    config = load_config(str(DEMO), [*layout, *schedule, *paths, *own, *args.overrides])
    ready, cpu_file = preflight(config, None), run_dir.with_suffix(".json")
    # Not in this process, even one rank: the next layout must fork from a clean one.
    process = multiprocessing.get_context("fork").Process(
        target=run_ranks, args=(run_steps, ready.layout.world, ready, cpu_file)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the run with {' '.join(layout)} failed")
    cpu_ms = json.loads(cpu_file.read_text())
    return [
        in_ms(record) | {"cpu_ms": cpu}
        for record, cpu in zip(read_metrics(run_dir), cpu_ms, strict=True)
        if record["step"] % in_each_phase >= WARM_UP
    ]


def run_steps(ready: Preflight, cpu_file: Path) -> None:
    """The run's steps; their CPU milliseconds, summed over ranks, go to `cpu_file`."""
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), build(ready) as run:
        spent = torch.zeros(ready.config.steps, dtype=torch.float64)
        for step in range(ready.config.steps):
            start = time.process_time()
            train_step(run, step, run.policy_for(step))
            spent[step] = 1000 * (time.process_time() - start)
        dist.all_reduce(spent)
        if dist.get_rank() == 0:
            cpu_file.write_text(json.dumps(spent.tolist()))


def in_ms(record: dict[str, Any]) -> dict[str, Any]:
    """A step's times by part, from its line in `metrics.jsonl`."""
    times = {f"{part}_ms": 1000 * record[f"time/{part}_s"] for part in PARTS}
    step = 1000 * record["time/step_s"]
    return {
        "policy": record["policy"],
        **times,
        "rest_ms": step - sum(times.values()),
        "step_ms": step,
    }


def medians(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per layout and policy, with the step's time over that of one rank."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step in steps:
        groups.setdefault((step["policy"], step["layout"]), []).append(step)
    rows = []
    for (policy, layout), members in groups.items():
        times = {k: median(m[k] for m in members) for k in members[0] if k.endswith("_ms")}
        rows.append({"policy": policy, "layout": layout, **times})
    alone = {row["policy"]: row["step_ms"] for row in rows if row["layout"] == next(iter(LAYOUTS))}
    return [row | {"step_ratio": row["step_ms"] / alone[row["policy"]]} for row in rows]


def as_table(policy: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one policy, in milliseconds."""
    title = f"a step of {policy}: milliseconds, and over one rank"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ("generate", "grade", "old-logp", "update", "sync", "rest", "step", "ratio", "cpu")
    for heading in ("layout", *headings):
        table.add_column(heading, justify="right")
    for row in rows:
        parts = [f"{row[f'{part}_ms']:.1f}" for part in (*PARTS, "rest", "step")]
        table.add_row(row["layout"], *parts, f"{row['step_ratio']:.2f}", f"{row['cpu_ms']:.1f}")
    return table


if __name__ == "__main__":
    main()
