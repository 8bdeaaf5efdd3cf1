"""Does every layout compute the same numbers? Each against transformers on one process.

    python tools/parity_matrix.py --json parity.json --write DESIGN.md

The cases are those of tests/mcore/test_parity.py: models under layouts of up to 8 processes, every
policy of each. The table gives the largest deviations of log-probs and gradients over all response
tokens, parameters and policies; for bf16, where rounding is the measure, as a multiple of what
transformers' own bf16 deviates from fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases are the tests'

from tests.mcore.parity import EXACT, measure, reference
from tests.mcore.parity_cases import CASES, Case
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_model

BEGIN, END = "<!-- parity matrix -->", "<!-- end of parity matrix -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases, print the table, and keep it where asked."""
    args = parse(argv)
    torch.set_num_threads(1)
    chosen = [case for case in CASES if args.only in case.name]
    console = Console(width=max(120, Console().width))
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            run(case, Path(folder, str(i)))
            for i, case in enumerate(track(chosen, "layouts", console=console, transient=True))
        ]
    table = Table(box=box.SIMPLE)
    for heading in headings():
        table.add_column(heading, justify="left" if heading == headings()[0] else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if args.write:
        write(args.write, rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this page")
    return parser.parse_args(argv)


def run(case: Case, model_dir: Path) -> dict[str, Any]:
    """The largest deviations of the case, over ranks."""
    make_tiny_model(model_dir, **case.model)
    expected = reference(case, model_dir)
    seen = run_ranks(case.ranks, measure, case, model_dir, expected)
    kinds = {
        kind: {name: max(getattr(s["gaps"][kind], name) for s in seen) for name in asdict(EXACT)}
        for kind in ("full", "internal")
    }
    exact = expected.allowed is EXACT
    return (
        {"case": case.name, "ranks": case.ranks, "dtype": case.dtype}
        | kinds
        | ({} if exact else {"transformers": asdict(expected.allowed)})
    )


def headings() -> list[str]:
    """The table's columns."""
    numbers = [
        f"{kind}: {what}" for kind in ("full", "internal") for what in ("log-probs", "grads")
    ]
    return ["model and layout", "ranks", *numbers]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    shown = [row["case"], str(row["ranks"])]
    for kind in ("full", "internal"):
        for name in ("logprobs", "grads"):
            gap = row[kind][name]
            bf16 = row.get("transformers")
            shown.append(f"{gap / bf16[name]:.1f}x" if bf16 else f"{gap:.1e}")
    return shown


def write(page: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between the two marks of `page` by the table."""
    lines = [headings(), ["---", *["--:"] * (len(headings()) - 1)], *(cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page}: has no {BEGIN} ... {END} to write between")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
