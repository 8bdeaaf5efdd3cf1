"""`megatron-bupo bed`: the demo's model and data in a directory of your own."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_bupo.config import expand


def run(args: Namespace) -> None:
    """Make what is missing of the bed in `--out`."""
    from megatron_bupo.bed.prepare import make_bed

    out = Path(expand(args.out))
    make_bed(out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.glob('[!.]*')))}")
