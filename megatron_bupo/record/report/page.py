"""The runs as one page. `page.html` beside this file is the page and draws all of it; this fills it
with tables, the choice of charts, and every metric of every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_bupo.pages.fill import fill
from megatron_bupo.record.journal import ACTIVITIES
from megatron_bupo.record.report import charts, facts
from megatron_bupo.record.report.curves import (
    CONFIDENCE,
    Curve,
    Shown,
    curve,
    metric_names,
    running_total,
    smoothed,
)

TEMPLATE = Path(__file__).with_suffix(".html")
DIGITS = 6  # significant, of the numbers on the page
POINTS = 1200  # of a line at most: more than there are pixels; of more steps, means stand there
CLOCKS = {"tokens": "rollout/sampled_tokens", "seconds": "time/step_s"}


def page(title: str, shown: Sequence[Shown]) -> str:
    """The page of what is `shown`."""
    names = metric_names(shown)
    report = {
        "identities": [asdict(facts.identity(one)) for one in shown],
        "differences": facts.differences(shown),
        "results": [asdict(fact) for fact in facts.results(shown)],
        "sections": [asdict(section) for section in charts.sections(shown)],
        "early": charts.early_steps(shown),
        "profiles": _profiles(shown),
        "time": [charts.seconds_per_step(one) for one in shown],
        "activities": {**ACTIVITIES, "other": "other"},
        "metrics": names,
        "switches": sorted(charts.switches(shown).items()),
        "lines": [_line(one, names) for one in shown],
        "confidence": CONFIDENCE,
    }
    return fill(TEMPLATE, title, {"report": _rounded(report)})


def _profiles(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    every = [(title, charts.profiles(shown, pattern)) for title, pattern in charts.PROFILES]
    return [{"title": t, "runs": [asdict(run) for run in runs]} for t, runs in every if runs]


def _line(shown: Shown, names: Sequence[str]) -> dict[str, Any]:
    """What the page draws of a run or of a group."""
    noisy = {line[0] for s in charts.SECTIONS for c in s.charts if c.noisy for line in c.lines}
    clocks = {name: running_total(shown, key) for name, key in CLOCKS.items()}
    return {
        "name": shown.name,
        "runs": len(shown.runs),
        "steps": max((r["step"] + 1 for run in shown.runs for r in run.records), default=0),
        "phases": charts.phase_spans(shown),
        "left": [
            r["step"] for run in shown.runs for r in run.records if r.get("guard/tripped") == 1
        ],
        "clocks": {name: _column(of) for name, of in clocks.items() if of is not None},
        "columns": {
            name: _column(of) for name in names if charts.is_drawn(of := curve(shown, name))
        },
        "smoothed": {name: _column(of) for name in noisy if (of := smoothed(shown, name)).at},
    }


def _column(of: Curve) -> dict[str, Any]:
    """Values `v` and half widths `h` at steps `a`; without `a`: from `f` on, one by one."""
    at, values, halves = thinned(of)
    steps = at == [at[0] + i for i in range(len(at))]
    where = {"f": at[0]} if steps else {"a": at}
    return {**where, "v": values, **({} if halves is None else {"h": halves})}


def thinned(of: Curve) -> Curve:
    """At most `POINTS` points, each the mean of as many that follow each other."""
    size = math.ceil(len(of.at) / POINTS)
    if size == 1:
        return of
    at, values, halves = (
        None if column is None else [_mean(part) for part in _parts(column, size)] for column in of
    )
    assert at is not None
    assert values is not None
    return Curve(at, values, halves)


def _parts(column: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    return (column[start : start + size] for start in range(0, len(column), size))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _rounded(value: Any) -> Any:
    """JSON's kinds of values alone; what is not finite is None."""
    if isinstance(value, dict):
        return {key: _rounded(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inside) for inside in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
