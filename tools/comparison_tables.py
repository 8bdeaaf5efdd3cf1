"""What came of a comparison, in rows: for people as tables, for programs as JSON.

See compare_methods.py; the statistics are those of comparison_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from tools.comparison_runs import Method
from tools.comparison_statistics import CONFIDENCE, Curve, Difference, Spread, budget_of

Curves = Mapping[str, Mapping[int, Curve]]  # of each method's finished seeds
MINUS = "\u2212"


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of a method, and its paired differences."""

    of_seeds: Mapping[int, float]
    spread: Spread
    to_reference: Difference | None  # None: it is the reference
    to_changed: Difference | None  # to the method that it changes; None: it is the reference


@dataclass(frozen=True)
class Row:
    """A method."""

    method: Method
    at_steps: Accuracy
    at_tokens: Accuracy
    steps_at_budget: float  # mean over seeds, as all below
    tokens: float  # response tokens sampled in all
    step_s: float
    clipped_fraction: float
    entropy_at_a_third: float  # nats
    sampling_noise: float


@dataclass(frozen=True)
class Comparison:
    """All of it."""

    rows: Sequence[Row]
    steps: int
    budget: float  # response tokens

    @property
    def comparisons(self) -> int:
        """With the reference, in each table."""
        return len(self.rows) - 1


def compare(curves: Curves, methods: Mapping[str, Method]) -> Comparison:
    """The methods that have finished runs, the first of which is the reference."""
    every = [curve for of_method in curves.values() for curve in of_method.values()]
    budget = budget_of(every)
    at_steps = {m: {s: c.accuracy[-1] for s, c in of.items()} for m, of in curves.items()}
    at_tokens = {m: {s: c.at_tokens(budget) for s, c in of.items()} for m, of in curves.items()}

    def accuracy(name: str, found: Mapping[str, Mapping[int, float]]) -> Accuracy:
        reference, changed = next(iter(found)), methods[name].changes

        def to(other: str | None) -> Difference | None:
            if name == reference or other is None or other not in found:
                return None
            if not found[name].keys() & found[other].keys():
                return None
            count = max(1, len(found) - 1)
            return Difference.of(found[name], found[other], comparisons=count)

        own = found[name]
        to_changed = None if changed == reference else to(changed)
        return Accuracy(own, Spread.of(list(own.values())), to(reference), to_changed)

    rows = []
    for name, of_method in curves.items():
        runs = list(of_method.values())
        rows.append(
            Row(
                methods[name],
                accuracy(name, at_steps),
                accuracy(name, at_tokens),
                steps_at_budget=fmean(run.at_tokens(budget, run.steps) for run in runs),
                tokens=fmean(run.tokens[-1] for run in runs),
                step_s=fmean(run.step_s for run in runs),
                clipped_fraction=fmean(run.clipped_fraction for run in runs),
                entropy_at_a_third=fmean(run.entropy_at_a_third() for run in runs),
                sampling_noise=fmean(run.sampling_noise for run in runs),
            )
        )
    return Comparison(rows, every[0].steps[-1], budget)


def tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """`(title, headings, rows)` of each table."""
    reference = comparison.rows[0].method.name
    differences = [f"{MINUS} {reference}", f"{MINUS} what it changes"]
    yield (
        f"After {comparison.steps} steps",
        ["method", "accuracy", *differences, "1,000 tokens", "s/step", "clipped", "entropy"],
        [
            [
                *_of(row, row.at_steps),
                f"{row.tokens / 1000:.1f}",
                f"{row.step_s:.2f}",
                f"{row.clipped_fraction:.2%}",
                f"{row.entropy_at_a_third:.3f}",
            ]
            for row in comparison.rows
        ],
    )
    yield (
        f"After {comparison.budget:,.0f} response tokens",
        ["method", "accuracy", *differences, "steps"],
        [[*_of(row, row.at_tokens), f"{row.steps_at_budget:.1f}"] for row in comparison.rows],
    )


def _of(row: Row, accuracy: Accuracy) -> list[str]:
    mean, sd, n = accuracy.spread
    changed = "" if accuracy.to_changed is None else f" ({row.method.changes})"
    return [
        row.method.name,
        f"{mean:.3f} ± {sd:.3f}" if n > 1 else f"{mean:.3f}",
        _shown(accuracy.to_reference),
        _shown(accuracy.to_changed) + changed,
    ]


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return ""
    mean, error, half, _ = difference
    if math.isnan(half):  # one pair has no interval
        return _signed(mean)
    ends = f"[{_signed(mean - half)}, {_signed(mean + half)}]"
    return f"{_signed(mean)} ± {error:.3f} {ends}{'*' * difference.stars}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def legend(comparison: Comparison) -> str:
    """How to read them."""
    rows, count = comparison.rows, comparison.comparisons
    seeds = sorted({row.at_steps.spread.n for row in rows})
    of_seeds = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    reference, by_chance = rows[0].method.name, (1 - CONFIDENCE) * count
    told = f"""\
accuracy: held-out, mean ± standard deviation over {of_seeds} seeds.
differences: paired by seed, mean ± standard error [t interval at {CONFIDENCE:.0%}].
*: it excludes 0, as some {by_chance:.1f} of {count} comparisons with {reference} would by chance.
**: so does the interval that allows for all {count} (Bonferroni).
tokens: of responses sampled, discarded groups too; s/step: without evaluation; clipped: of tokens;
entropy: of the full policy, nats per token, around a third of the steps."""
    noise = fmean(row.sampling_noise for row in rows)
    if math.isnan(noise):
        return told
    return f"{told}\nnoise: with other draws a run's accuracy would differ by {noise:.4f} (sd)."


def as_markdown(comparison: Comparison, failures: Sequence[str], command: str) -> str:
    """A page."""
    parts = [f"`{command}`"]
    for title, headings, rows in tables(comparison):
        lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"## {title}", table.replace("*", r"\*")]
    told = legend(comparison).replace("*", r"\*")
    return "\n\n".join([*parts, told, *failures]) + "\n"


def as_rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_json(comparison: Comparison, curves: Curves) -> dict[str, Any]:
    """Everything, with the curves of all runs."""
    return {
        "steps": comparison.steps,
        "budget_tokens": comparison.budget,
        "confidence": CONFIDENCE,
        "rows": [
            {
                **asdict(row),
                "at_steps": _accuracy_as_json(row.at_steps),
                "at_tokens": _accuracy_as_json(row.at_tokens),
                "curves": {seed: asdict(curve) for seed, curve in curves[row.method.name].items()},
            }
            for row in comparison.rows
        ],
    }


def _accuracy_as_json(accuracy: Accuracy) -> dict[str, Any]:
    differences = {"to_reference": accuracy.to_reference, "to_changed": accuracy.to_changed}
    return {
        "of_seeds": accuracy.of_seeds,
        "mean": accuracy.spread.mean,
        "sd": accuracy.spread.sd,
        **{
            name: None if found is None else {**found._asdict(), "stars": found.stars}
            for name, found in differences.items()
        },
    }
