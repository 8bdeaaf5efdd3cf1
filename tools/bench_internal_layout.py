"""What does it bring to give the internal phase a layout of its own (`bupo.internal_layout`)?

    python tools/bench_internal_layout.py --json layout.json
    python tools/bench_internal_layout.py --layer 4 parallel.pp=4 bupo.internal_layout.tp=2

A random Qwen3 of 12 layers is trained at layer 2: in the whole model in place (PP 4, whose upper
three stages then wait), and on an actor of two layers on the same ranks (DP 4). The two take turns,
each following the other through a checkpoint as at a phase switch, so that whatever else the
machine does meets both alike; medians are compared. Where ranks outnumber the processor's cores,
those that work in place have the cores of those that wait, as they would not on machines apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the measuring is a module of its own

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.checkpoints import checkpoint_dir
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.phase_actor import plan_actor, storages
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight, check_model
from tools import options
from tools.phase_cost import over_ranks, peak_of, together_ms
from tools.shapes import Shape

LAYOUTS = ("parallel.pp=4", "bupo.internal_layout.dp=4")
QUANTITIES = {  # heading: key, what a shown number counts
    "old log-probs": ("old_logprobs_ms", "ms", 1.0),
    "update": ("update_ms", "ms", 1.0),
    "weight sync": ("sync_ms", "ms", 1.0),
    "weights, gradients, moments": ("held_bytes", "MB", 1e6),
    "peak beside them, in an update": ("peak_bytes", "MB", 1e6),
}


@dataclass(frozen=True)
class Setup:
    """What every rank is told."""

    ready: Preflight
    shape: Shape
    layer: int
    repeats: int
    steps: int  # between two turns
    folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, train it both ways, tell and write what came out."""
    args = parse(argv)
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    with tempfile.TemporaryDirectory() as folder:
        shape.write_model(Path(folder, "model"))
        model = (f"model.path={folder}/model", "data.train=none")
        phase = (f"bupo.target_layer={args.layer}", "bupo.internal_steps=1")
        sizes = (f"trainer.microbatch_size={args.microbatch}", *LAYOUTS)
        config = load_config(None, [*model, *phase, *sizes, *args.overrides])
        layout = check(config, None)
        ready = Preflight(config, check_model(config, training=False), layout)
        setup = Setup(ready, shape, args.layer, args.repeats, args.steps, Path(folder))
        run_ranks(measure, layout.world, setup)
        rows = json.loads(Path(folder, "medians.json").read_text())
    console, own = Console(), rows[1]
    console.print(as_table(rows, args.layer, layout.world))
    console.print(
        f"The switch to the whole model: {own['save_ms']:.0f} ms for the checkpoint, "
        f"{own['take_over_ms']:.0f} ms to build and load."
    )
    if args.json:
        layouts = {"parallel": config.parallel, "internal_layout": config.bupo.internal_layout}
        report = {"layer": args.layer, "rows": rows, "shape": asdict(shape)}
        report |= {name: asdict(sizes) for name, sizes in layouts.items() if sizes}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    numbers = {"layer": 2, "microbatch": 2, "repeats": 5, "steps": 3} | asdict(Shape())
    options.add_numbers(parser, numbers)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def measure(setup: Setup) -> None:
    """Medians of all that is measured either way, in place first. Every rank runs this."""
    torch.set_num_threads(1)  # of the CPU: threads that wait for a busy core would tell of others
    ready, policy = setup.ready, InternalLayerPolicy(setup.layer)
    plans = [  # the whole model, and what the internal phase needs of it
        plan_actor(trained, ready.architecture, ready.config, ready.layout.world)
        for trained in (FULL, policy)
    ]
    samples: list[list[dict[str, float]]] = [[], []]
    with parallel.joined(plans[0].layout, seed=0):
        trainer = plans[0].build()
        for turn in range(2 * setup.repeats + 2):  # the first two only warm up
            found = [time_step(trainer, setup.shape, policy) for _ in range(setup.steps)]
            sample = {name: median(one[name] for one in found) for name in found[0]}
            sample |= measure_memory(trainer, setup.shape, policy)
            start = together_ms()
            checkpoint.save(trainer, setup.folder, turn, {}, keep=1)
            saved = together_ms()
            path = checkpoint_dir(setup.folder, turn)
            trainer = plans[(turn + 1) % 2].take_over(trainer, path)
            sample |= {"save_ms": saved - start, "take_over_ms": together_ms() - saved}
            if turn >= 2:
                samples[turn % 2].append(over_ranks(sample))
        if dist.get_rank() == 0:
            rows = [
                {name: median(one[name] for one in found) for name in found[0]} for found in samples
            ]
            Path(setup.folder, "medians.json").write_text(json.dumps(rows))


def time_step(
    trainer: MegatronTrainer, shape: Shape, policy: InternalLayerPolicy
) -> dict[str, float]:
    """Milliseconds of a step of the internal phase, in its parts."""
    batch = shape.batch()
    start = together_ms()
    old, _ = trainer.logprobs(batch, policy)
    scored = together_ms()
    trainer.update(batch.with_old_logprobs(old), policy, lr=1e-6)
    updated = together_ms()
    dict(trainer.changed_weights(policy))
    return {
        "old_logprobs_ms": scored - start,
        "update_ms": updated - scored,
        "sync_ms": together_ms() - updated,
    }


def measure_memory(
    trainer: MegatronTrainer, shape: Shape, policy: InternalLayerPolicy
) -> dict[str, float]:
    """Bytes that this rank keeps, and the peak of what an update adds."""
    batch = shape.batch()
    batch = batch.with_old_logprobs(torch.zeros(batch.input_ids.shape))
    _, peak = peak_of(lambda: trainer.update(batch, policy, lr=0.0))
    held = {storage.data_ptr(): storage.nbytes() for storage in storages(trainer)}
    return {"held_bytes": sum(held.values()), "peak_bytes": peak}


def as_table(rows: Sequence[Mapping[str, Any]], layer: int, ranks: int) -> Table:
    """A line per quantity: of the slowest or fullest rank in place, on its own, and the ratio."""
    table = Table(title=f"internal layer {layer} on {ranks} ranks")
    for heading in ("", "in place", "own layout", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for heading, (key, unit, one) in QUANTITIES.items():
        in_place, own = (row[key] for row in rows)
        shown = (f"{in_place / one:.1f} {unit}", f"{own / one:.1f} {unit}")
        table.add_row(heading, *shown, f"{own / in_place:.2f}")
    return table


if __name__ == "__main__":
    main()
