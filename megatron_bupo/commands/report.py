"""`megatron-bupo report`: one run or several side by side, as a page and figures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.record.report.curves import each, grouped
from megatron_bupo.record.report.runs import RunRecord, read_runs
from megatron_bupo.record.report.write import write_report

LONGEST = 80  # characters that the names of runs give a directory


def run(args: Namespace) -> None:
    """Read the runs, write the report, and say where it is."""
    names = None if args.names is None else [name.strip() for name in args.names.split(",")]
    runs = read_runs([Path(expand(path)) for path in args.runs], names)
    if len(runs) < len(args.runs):
        print(f"{len(args.runs)} directories name {len(runs)} runs: each is shown once")
    for one in runs:
        if not one.records:
            print(f"{one.path}: no step has finished yet")
    groups = grouped(runs)
    alike = len(runs) - len(groups)
    if alike and not args.group_seeds:
        print("some runs differ only by their seed: --group-seeds shows their means and intervals")
    if args.group_seeds and not alike:
        print("--group-seeds: no two runs differ only by their seed")
    out = Path(expand(args.out)) if args.out else beside(runs)
    page, *figures = write_report(out, groups if args.group_seeds else each(runs))
    print(f"{page}: {page.stat().st_size / 1e3:,.0f} kB, to be opened in a browser")
    if figures:
        print(f"{figures[0].parent}: {', '.join(file.name for file in figures)}")


def beside(runs: Sequence[RunRecord]) -> Path:
    """Where the report goes: into the run's own directory, or beside the first of several."""
    if len(runs) == 1:
        return runs[0].path / "report"
    names = "-".join(run.path.name for run in runs)
    if len(names) > LONGEST:
        names = f"{runs[0].path.name}-and-{len(runs) - 1}-more"
    return runs[0].path.parent / f"report-{names}"
