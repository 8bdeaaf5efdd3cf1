"""Are two checkpoints the same model?

    python tools/verify_conversion.py FIRST SECOND [parallel.tp=2 ...]
    python tools/verify_conversion.py --hf DIR --megatron DIR --json report.json

The same as `megatron-bupo convert verify`. Exit code 0: the same; 1: they differ, and the table
names what; 2: something could not be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_bupo.cli import main as megatron_bupo


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit code."""
    return megatron_bupo(["convert", "verify", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
