"""How many of the failed responses failed by their plan? Numbers of each input and step, as a table
and as a picture of their course.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_bupo.record.figure import marker, panels
from megatron_bupo.record.planning_figure import EXECUTION as EXECUTION_COLOR
from megatron_bupo.record.planning_figure import PLANNING as PLANNING_COLOR
from tools.error_judge import EXECUTION, KINDS, OTHER, PLANNING, UNCLEAR
from tools.failed_responses import Failures, Place

STYLES = ["-", "--", ":", "-."]  # of the inputs, in turn
Row = dict[str, Any]  # of the summary


def rows_of(failures: Failures, choices: Sequence[str | None]) -> list[Row]:
    """The numbers of each input and step, in order."""
    kinds: dict[Place, Counter[str]] = {place: Counter() for place in failures.responses}
    for response, choice in zip(failures.chosen, choices, strict=True):
        if choice is not None:
            kinds[response.place][KINDS.get(choice, choice)] += 1
    chosen = Counter(response.place for response in failures.chosen)
    return [
        {
            "source": source,
            "step": step,
            "responses": failures.responses[source, step],
            "failed": failures.failed[source, step],
            "not_graded": failures.not_graded[source, step],
            "unanswered": chosen[source, step] - some.total(),
            **{kind: some[kind] for kind in (PLANNING, EXECUTION, OTHER, UNCLEAR)},
            "planning_fraction": some[PLANNING] / some.total() if some else None,
            "execution_fraction": some[EXECUTION] / some.total() if some else None,
        }
        for (source, step), some in kinds.items()
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """The rows for a reader; columns that say nothing are left out."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    sources = {row["source"] for row in rows}
    shown = [name for name in rows[0] if name == "step" or any(row[name] for row in rows)]
    shown = [name for name in shown if name != "source" or len(sources) > 1]
    for name in shown:
        justify = "left" if name == "source" else "right"
        heading = name.replace("_fraction", " %").replace("_", " ")
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in shown))
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if name.endswith("_fraction") else str(value)


def draw(path: Path, rows: Sequence[Row], policies: Mapping[Place, str]) -> None:
    """Both shares over the steps of runs; the phases too, where there is but one run."""
    runs = {row["source"]: [] for row in rows if row["step"] is not None}
    for row in rows:
        if row["step"] is not None:
            runs[row["source"]].append(row)
    if not runs:
        return
    steps = sorted({row["step"] for its in runs.values() for row in its})
    [source, *others] = runs
    phases = {step: "full" if others else policies.get((source, step), "full") for step in steps}
    records = [{"step": step, "policy": policy} for step, policy in phases.items()]
    figure, [axes] = panels(records, rows=1, size=(8.5, 4))
    for (name, its), style in zip(runs.items(), cycle(STYLES), strict=False):
        at = [row["step"] for row in its]
        for kind, color in ((PLANNING, PLANNING_COLOR), (EXECUTION, EXECUTION_COLOR)):
            shares = [row[f"{kind}_fraction"] for row in its]
            label = f"{kind}, {name}" if others else kind
            drawn = [float("nan") if share is None else share for share in shares]
            axes.plot(at, drawn, style, color=color, marker=marker(at), label=label)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of failed responses")
    axes.legend(loc="best", frameon=False, fontsize=9)
    figure.savefig(path)
