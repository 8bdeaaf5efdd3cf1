"""`megatron-bupo cancel RUN`: end what was launched, for good."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.launch import jobs, record


def run(args: Namespace) -> None:
    """Ask it to save and end; `--now`: end it."""
    run_dir = Path(expand(args.run_dir))
    print(jobs.cancel(record.read(run_dir), run_dir, now=args.now))
