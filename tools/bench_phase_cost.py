"""What does a step of an internal layer policy cost, beside one of the full policy?

    python tools/bench_phase_cost.py --json cost.json
    python tools/bench_phase_cost.py --layers 8 --pp 2 parallel.dp=2 megatron.bucket_size=200000

Layers above l are neither run nor trained, so layer l should cost about (l + 1) / (L + 1) of full
depth; the one stands for embedding and unembedding. A random Qwen3 is measured at l = 1/6, 1/2 and
5/6 of its depth and at full depth, under one layout, in one run. The depths take turns, so that
whatever else the machine does meets all of them alike, and medians are compared. What costs more
than a quarter above that share is taken apart below the table, by measured parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the measuring is a module of its own

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.layout import Layout
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight, check_model
from tools import options
from tools.phase_cost import PhaseCost
from tools.shapes import Shape

TOLERATED = 1.25  # times the share of layers; a ratio above is explained


@dataclass(frozen=True)
class Quantity:
    """A row of the table: what is measured, and the parts of it, measured too, that every policy
    pays alike.
    """

    heading: str
    key: str
    fixed: tuple[str, ...]

    @property
    def unit(self) -> tuple[str, float]:
        """What a shown number counts."""
        kind = self.key.rsplit("_", 1)[1]
        return {"ms": ("ms", 1.0), "bytes": ("MB", 1e6), "parameters": ("M", 1e6)}[kind]


QUANTITIES = (
    Quantity("old log-probs", "old_logprobs_ms", ("unembedding_forward_ms",)),
    Quantity("forward and backward", "forward_backward_ms", ("unembedding_ms",)),
    Quantity("work in it, all ranks", "work_ms", ("unembedding_work_ms",)),
    Quantity("optimizer", "optimizer_ms", ("beside_step_ms",)),
    Quantity("update", "update_ms", ("unembedding_ms", "beside_step_ms")),
    Quantity("weight sync", "sync_ms", ("ends_sync_ms",)),
    Quantity("peak memory in it", "peak_bytes", ("unembedding_peak_bytes",)),
    Quantity("gradients summed", "reduced_bytes", ("ends_reduced_bytes",)),
    Quantity("parameters gathered", "gathered_bytes", ("ends_gathered_bytes",)),
    Quantity("parameters stepped", "stepped_parameters", ("ends_stepped_parameters",)),
    Quantity("weights sent", "synced_bytes", ("ends_synced_bytes",)),
)
PARTS = {  # by the begin of their keys
    "unembedding": "the unembedding's",
    "beside_step": "beside Adam's step (norm, copies, gathers, waiting)",
    "ends": "of embedding and unembedding",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, measure it on the layout's ranks, tell and write what came out."""
    args = parse(argv)
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    with tempfile.TemporaryDirectory() as folder:
        shape.write_model(Path(folder, "model"))
        settings = (f"model.path={folder}/model", "data.train=none")
        layout_settings = (f"parallel.tp={args.tp}", f"parallel.pp={args.pp}")
        # As few layers to a bucket as there can be: at scale, one has more parameters than that.
        sizes = (f"trainer.microbatch_size={args.microbatch}", "megatron.bucket_size=1")
        config = load_config(None, [*settings, *layout_settings, *sizes, *args.overrides])
        layout = check(config, None, training=False)
        ready = Preflight(config, check_model(config, training=False), layout)
        found = Path(folder, "medians.json")
        run_ranks(measure, layout.world, ready, shape, args.repeats, found)
        rows = with_ratios(json.loads(found.read_text()), shape.layers)
    console = Console()
    console.print(as_table(rows, layout))
    for line in explanations(rows, layout):
        console.print(line, soft_wrap=True)
    if args.json:
        report = {"layers": shape.layers, "rows": rows}
        report |= {"shape": asdict(shape), "layout": asdict(layout)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    numbers = {"tp": 1, "pp": 1, "microbatch": 4, "repeats": 9} | asdict(Shape())
    options.add_numbers(parser, numbers)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def measure(ready: Preflight, shape: Shape, repeats: int, out: Path) -> None:
    """Medians of all that is measured at each depth, as rows in `out`. Every rank runs this."""
    torch.set_num_threads(1)  # of the CPU: threads that wait for a busy core would tell of others
    with parallel.joined(ready.layout, seed=0):
        with ExitStack() as files:
            index = read_index(ready.config.model.path)
            trainer = MegatronTrainer(ready.architecture, ready.config, slice_opener(index, files))
        rows = measure_depths(PhaseCost(trainer, shape.batch()), shape, repeats)
        if dist.get_rank() == 0:
            out.write_text(json.dumps(rows))


def measure_depths(cost: PhaseCost, shape: Shape, repeats: int) -> list[dict[str, float]]:
    """A row per depth: medians over repeats."""
    samples: dict[int, list[dict[str, float]]] = {depth: [] for depth in shape.depths}
    for repeat in range(-1, repeats):  # the first round only warms up
        for depth in shape.depths[:: -1 if repeat % 2 else 1]:
            sample = cost.of(shape.policy(depth))
            if repeat >= 0:
                samples[depth].append(sample)
    return [
        {"layer": depth}
        | {name: median(s[name] for s in found) for name in found[0]}
        | cost.peak_bytes(shape.policy(depth))
        for depth, found in samples.items()
    ]


def with_ratios(rows: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """The rows with everything over what it is at full depth, which is the last row."""
    full = rows[-1]
    return [
        dict(row)
        | {f"{q.key}_ratio": row[q.key] / full[q.key] for q in QUANTITIES if full[q.key]}
        | {"share_of_layers": (row["layer"] + 1) / (layers + 1)}
        for row in rows
    ]


def as_table(rows: Sequence[Mapping[str, Any]], layout: Layout) -> Table:
    """What is measured and, behind each number, its ratio to full depth."""
    table = Table(title=f"tp {layout.tp}, pp {layout.pp}, dp {layout.dp}; and over full depth")
    table.add_column("")
    for row in rows:
        heading = f"layer {row['layer']}\n{row['share_of_layers']:.2f}"
        table.add_column(heading, justify="right", no_wrap=True)
    for quantity in QUANTITIES:
        name, scale = quantity.unit
        if f"{quantity.key}_ratio" not in rows[-1]:
            continue
        cells = [
            f"{row[quantity.key] / scale:.1f} {row[f'{quantity.key}_ratio']:.2f}" for row in rows
        ]
        table.add_row(f"{quantity.heading}, {name}", *cells)
    return table


def explanations(rows: Sequence[Mapping[str, Any]], layout: Layout) -> list[str]:
    """Where a ratio is more than a quarter above the share of layers, and what is in it."""
    full, lines = rows[-1], []
    for row in rows[:-1]:
        limit = TOLERATED * row["share_of_layers"]
        above = [q for q in QUANTITIES if row.get(f"{q.key}_ratio", 0.0) > limit]
        lines += [_taken_apart(q, row, full, limit) for q in above]
        if layout.pp > 1 and above:
            memory = row["all_peaks_bytes"] / full["all_peaks_bytes"]
            lines.append(
                f"Layer {row['layer']}: of full depth's work all ranks together have "
                f"{row['work_ms_ratio']:.2f}, and of its memory {memory:.2f}; but stages above the "
                "target wait for those below."
            )
    return lines


def _taken_apart(
    quantity: Quantity, row: Mapping[str, Any], full: Mapping[str, Any], limit: float
) -> str:
    name, scale = quantity.unit
    ratio, value = row[f"{quantity.key}_ratio"], row[quantity.key]
    fixed, of_full = (sum(of[part] for part in quantity.fixed) for of in (row, full))
    shown = " and ".join(
        f"{row[part] / scale:.2f} {what}"
        for part in quantity.fixed
        for begin, what in PARTS.items()
        if part.startswith(begin)
    )
    rest = (value - fixed) / (full[quantity.key] - of_full)
    return (
        f"Layer {row['layer']}, {quantity.heading}: {ratio:.2f} is above {limit:.2f}. Of "
        f"{value / scale:.2f} {name}, {shown} are every policy's; the rest is {rest:.2f} of full "
        f"depth's, where layers are {row['layer'] / full['layer']:.2f}."
    )


if __name__ == "__main__":
    main()
