"""Which methods differ beyond the noise of seeds? All from one base model, on the demo's bed.

    python tools/compare_methods.py --out runs/compare

Every method of compare_methods.yaml is trained with the same data, seeds and number of steps, and
nothing but its own settings changed. What comes of it is compared at equal steps and at an equal
number of sampled response tokens, in pairs of equal seeds:

    OUT/METHOD/seed_N/     the runs, each as `megatron-bupo train` leaves it, with its log.txt
    OUT/comparison.json    all numbers, with the curves of every run
    OUT/comparison.md      the tables
    OUT/*.png              learning curves, entropies, and the differences with their intervals

Stopped or killed, the same command goes on; with more methods, seeds or --jobs too. --report tells
of what has ended so far and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs, tables, ... are modules beside this one

from megatron_bupo.command_line import count
from megatron_bupo.config import Config
from megatron_bupo.config.checks import check
from megatron_bupo.data.rows import read_rows
from megatron_bupo.errors import InputError
from megatron_bupo.launch.lock import hold
from megatron_bupo.preflight import check_data, check_files, prepare
from megatron_bupo.record.metrics import read_metrics
from tools import comparison_figures, comparison_tables
from tools.comparison_runs import Ended, Method, Planned, of_method, plan, read_methods, run_all
from tools.comparison_statistics import Curve

METHODS = Path(__file__).with_suffix(".yaml")
CONFIG = Path(__file__).parents[1] / "conf" / "compare_methods.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and tell what came of it; the exit code."""
    args = arguments().parse_args(argv)
    command = shlex.join(
        ["python", "tools/compare_methods.py", *(sys.argv[1:] if argv is None else argv)]
    )
    console = Console(stderr=True)
    try:
        methods, panels = read_methods(args.table)
        planned = plan_all(args, chosen(methods, args.methods))
        missing = [] if args.report else [run for run in planned if not run.has_ended()]
        look_at(planned)
        with nullcontext() if args.report else hold(args.out, key="--out "):
            over = run_all(missing, jobs=args.jobs, console=console)
            failures = [one for one in over if one.code]
            tell(args.out, planned, panels, failures, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failures else 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="runs, tables and figures")
    add(
        "--methods", nargs="+", metavar="NAME", help="beside the first, the reference; default: all"
    )
    add("--seeds", type=count, default=5, metavar="N", help="seeds 0 to N - 1 (5)")
    add("--steps", type=count, metavar="N", help="of each run; default: the config's")
    add("--jobs", type=count, default=1, metavar="N", help="runs side by side (1)")
    add("--config", default=str(CONFIG), metavar="FILE", help="what all runs share (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs; repeatable")
    add("--table", type=Path, default=METHODS, metavar="FILE", help="the methods (%(default)s)")
    add("--report", action="store_true", help="tell of what has ended so far, and run nothing")
    return parser


def chosen(methods: Mapping[str, Method], names: Sequence[str] | None) -> list[Method]:
    """The reference, and of the other methods those in `names`; None: all."""
    for name in names or ():
        if name not in methods:
            way_out = f"choose of {', '.join(methods)}"
            raise InputError(f"--methods {name}", "is no method of the table", way_out)
    reference = next(iter(methods))
    return [m for m in methods.values() if names is None or m.name in {reference, *names}]


def plan_all(args: argparse.Namespace, methods: Sequence[Method]) -> list[Planned]:
    """All runs, seed by seed: whenever it is stopped, methods have had as many."""
    overrides = [*args.set, *([] if args.steps is None else [f"steps={args.steps}"])]
    return [
        plan(method, seed, args.out, config=args.config, overrides=overrides)
        for seed in range(args.seeds)
        for method in methods
    ]


def look_at(planned: Sequence[Planned]) -> None:
    """Whatever of settings, model or data would not do, told before anything is started."""
    first, *others = {run.method.name: run for run in planned}.values()
    prepare(first.config)
    for run in (first, *others):
        try:
            check(run.config, None)
            can_be_compared(run.config, first.config.steps)
            check_files(run.config)
        except InputError as error:
            raise of_method(run.method, error) from None
    check_data(first.config)


def can_be_compared(config: Config, steps: int) -> None:
    """A run that trains for as many `steps` as the others, and is evaluated after the last."""
    every = config.evaluation.every
    if config.debug.rollout_only:
        raise InputError("debug.rollout_only=true", "trains nothing", "leave it out")
    if config.steps != steps:
        reason = f"methods are compared after as many steps, and the reference has {steps}"
        raise InputError(f"steps={config.steps}", reason, "set it for all by --steps")
    if not every or steps % every:
        reason = f"leaves step {steps}, where methods are compared, without an evaluation"
        raise InputError(f"evaluation.every={every}", reason, "choose a divisor of steps")


def tell(
    out: Path,
    planned: Sequence[Planned],
    panels: Mapping[str, Sequence[str]],
    failures: Sequence[Ended],
    command: str,
) -> None:
    """Tables and figures of the runs that have ended."""
    curves: dict[str, dict[int, Curve]] = {run.method.name: {} for run in planned}
    questions = questions_of(planned[0].config)
    for run in planned:
        if run.has_ended():
            records = read_metrics(run.run_dir)
            curves[run.method.name][run.seed] = Curve.of(records, questions)
    curves = {name: dict(sorted(of.items())) for name, of in curves.items() if of}
    reference = planned[0].method.name
    if reference not in curves:
        raise InputError(f"--out {out}", f"no run of {reference} has ended", "leave --report out")
    methods = {run.method.name: run.method for run in planned}
    comparison = comparison_tables.compare(curves, methods)
    failed = [f"Failed: {one}" for one in failures]
    page = comparison_tables.as_markdown(comparison, failed, command)
    numbers = without_nan(comparison_tables.as_json(comparison, curves))
    (out / "comparison.md").write_text(page, encoding="utf-8")
    (out / "comparison.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    console = Console(width=max(140, Console().width))
    for table in comparison_tables.tables(comparison):
        console.print(comparison_tables.as_rich(*table))
    console.print(comparison_tables.legend(comparison), highlight=False, markup=False)
    drawn = comparison_figures.draw(out, comparison, curves, panels)
    names = ["comparison.md", "comparison.json", *(path.name for path in drawn)]
    console.print(f"{out}: {', '.join(names)}")


def questions_of(config: Config) -> int | None:
    """How many there are in the only benchmark; None where there are several or none has a name."""
    if len(config.evaluation.benchmarks) != 1:
        return None
    most = config.evaluation.max_prompts
    count = sum(1 for _ in read_rows(config.evaluation.benchmarks[0].data))
    return count if most is None else min(count, most)


def without_nan(value: Any) -> Any:
    """`value` with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
