"""How fast and how thrifty is the actor beside TRL and beside the BuPO authors' way?

    pip install 'megatron-bupo[bench]'
    python tools/bench_peers.py --json peers.json

Forward and backward of the policy loss on one batch: of the full policy by TRL's own GRPOTrainer,
by plain torch and by our trainer; of an internal layer policy the authors' way and by our trainer.
Then whole steps of the demo, by TRL's GRPOTrainer and by us. Loss and gradient norm must agree.

Each variant lives in a process of its own, and they take turns at one round each, so that whatever
else the machine does meets all of them alike; medians are compared. CPU seconds (of one thread)
tell of the work even where the machine is busy. Memory is how far the resident set rises within a
round, every tensor mapped by itself: what is alive at the peak beyond weights, gradients and
optimizer state.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # the variants are in a module beside this one

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.bed.prepare import make_bed
from tools import options, peers
from tools.turns import MEASURED, Variant, medians_in_turns

TRL, PLAIN, AUTHORS, OURS = "TRL", "plain logits", "authors' way", "megatron_bupo"
AGREE = 1e-4  # relative, of losses and gradient norms


def main(argv: Sequence[str] | None = None) -> None:
    """Let them take turns, and tell what came out."""
    args = parse(argv)
    case, bed = (
        peers.Case(**{f.name: getattr(args, f.name) for f in fields(peers.Case)}),
        args.bed.resolve(),
    )
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    make_bed(bed)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        case.write_model(model)
        internal = InternalLayerPolicy(case.target_layer)
        races: dict[str, dict[str, Variant]] = {
            "full policy": {
                TRL: partial(peers.trl_loss, case, model),
                PLAIN: partial(peers.plain_loss, case, model),
                OURS: partial(peers.our_loss, case, model, FULL, args.overrides),
            },
            f"internal layer {case.target_layer}": {
                AUTHORS: partial(peers.authors_loss, case, model),
                OURS: partial(peers.our_loss, case, model, internal, args.overrides),
            },
            "step of the bed": {
                TRL: partial(peers.trl_step, bed),
                OURS: partial(peers.our_step, bed, args.overrides),
            },
        }
        repeats = [args.rounds, args.rounds, args.steps]
        rows = [
            row
            for (what, variants), rounds in zip(races.items(), repeats, strict=True)
            for row in compare(what, variants, rounds, Path(folder))
        ]
    versions = {name: version(name) for name in ("trl", "transformers", "torch", "megatron-core")}
    Console().print(as_table(rows, versions))
    if args.json:
        report = {"rows": rows, "versions": versions, "case": asdict(case)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    numbers = {"rounds": 3, "steps": 30} | asdict(peers.Case())
    options.add_numbers(parser, numbers)
    options.add_bed(parser)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def compare(
    what: str, variants: dict[str, Variant], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """A row per variant: medians over rounds, and their ratios to ours."""
    medians = medians_in_turns(variants, rounds, folder / what)
    ours = medians[OURS]
    for name in ours.keys() - set(MEASURED):
        values = {who: found[name] for who, found in medians.items()}
        if any(abs(value - ours[name]) > AGREE * abs(ours[name]) for value in values.values()):
            raise SystemExit(f"{what}: the {name} differs, so speed tells nothing: {values}")
    return [
        {"what": what, "who": who, **found}
        | {f"{name}_ratio": found[name] / ours[name] for name in MEASURED}
        for who, found in medians.items()
    ]


def as_table(rows: Sequence[dict[str, Any]], versions: Mapping[str, str]) -> Table:
    """Seconds and MB, and behind each its ratio to ours."""
    title = ", ".join(f"{name} {number}" for name, number in versions.items())
    table = Table(title=title, caption="behind each number: its ratio to ours")
    for heading in ("", "", "s", "CPU s", "extra MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        numbers = (f"{row['s']:.2f}", f"{row['cpu_s']:.2f}", f"{row['extra_bytes'] / 1e6:.0f}")
        ratios = (f"{row[f'{name}_ratio']:.2f}" for name in MEASURED)
        cells = map(" ".join, zip(numbers, ratios, strict=True))
        table.add_row(row["what"], row["who"], *cells, end_section=row["who"] == OURS)
    return table


if __name__ == "__main__":
    main()
