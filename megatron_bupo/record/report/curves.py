"""What becomes of a metric over a run, or over runs that differ only by their seed?

The horizontal axis counts the steps behind a policy, as in `record/figure.py`: what step k records
stands at k, and an evaluation, which ends its step, at k + 1; the one before training is the first
point of the same line. Over seeds a point is the mean m of n runs, at steps that all of them have::

    m -+ t s / sqrt(n),    t of Student's distribution with n - 1 degrees of freedom, 95 %
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import fmean, median, stdev
from typing import NamedTuple

from megatron_bupo.intervals import student_quantile
from megatron_bupo.record.figure import trailing_mean
from megatron_bupo.record.report.runs import Record, RunRecord

CONFIDENCE = 0.95
INTERNAL_NATS = "entropy/internal_nats"  # of the layer that a phase trains
INITIAL, EVAL = "eval/initial_", "eval/"


@dataclass(frozen=True)
class Shown:
    """What has a line in every chart: a run, or several that differ only by their seed."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """Of the longest of the runs."""
        return max((run.records for run in self.runs), key=len)


class Curve(NamedTuple):
    """A metric at `at`, in steps behind the policy; NaN is a gap in the line."""

    at: list[float]
    values: list[float]
    halves: list[float] | None = None  # half widths of intervals over seeds; None: of one run


def each(runs: Sequence[RunRecord]) -> list[Shown]:
    """Every run for itself."""
    return [Shown(run.name, (run,)) for run in runs]


def grouped(runs: Sequence[RunRecord]) -> list[Shown]:
    """Runs that differ only by `seed` (and by what they are called) together, in order."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(_but_for_the_seed(run), []).append(run)
    return [Shown(_common_name(group), tuple(group)) for group in groups.values()]


def _but_for_the_seed(run: RunRecord) -> str:
    if run.settings is None:
        return str(run.path)  # nobody knows: alone
    own = {k: v for k, v in run.settings.items() if not called_or_seeded(k)}
    return json.dumps(own, sort_keys=True, default=str)


def called_or_seeded(key: str) -> bool:
    """Is the setting `key` the seed, or how a run is called and tells of itself?"""
    return key in {"seed", "run_dir"} or key.startswith("logging.")


def _common_name(group: Sequence[RunRecord]) -> str:
    first = group[0].name
    if len(group) == 1:
        return first
    letters_of = zip(*(run.name for run in group), strict=False)
    alike = takewhile(lambda letters: len(set(letters)) == 1, letters_of)
    common = "".join(letters[0] for letters in alike).rstrip("0123456789").rstrip(" -_./")
    common = common.removesuffix("seed").rstrip(" -_./")
    return f"{common or first}, {len(group)} seeds"


def metric_names(shown: Sequence[Shown]) -> list[str]:
    """Every metric that a run has, in order."""
    keys = {key for one in shown for run in one.runs for record in run.records for key in record}
    return sorted({_folded(key) for key in keys if "/" in key})


def _folded(key: str) -> str:
    """What was measured before training belongs to what was measured since."""
    return EVAL + key.removeprefix(INITIAL) if key.startswith(INITIAL) else key


def smoothed(shown: Shown, key: str) -> Curve:
    """The metric `key`, of each run the trailing mean; its interval is of that."""
    return curve(shown, key, window=min(10, max(1, len(shown.records) // 12)))


def curve(shown: Shown, key: str, *, window: int = 1) -> Curve:
    """The metric `key` of a run or over seeds; each value with the `window` - 1 before it."""
    every = [points for run in shown.runs if (points := dict(_points(run.records, key)))]
    if window > 1:
        means = [trailing_mean(list(points.values()), window) for points in every]
        every = [
            dict(zip(points, of, strict=True)) for points, of in zip(every, means, strict=True)
        ]
    if not every:
        return Curve([], [])
    if len(every) == 1:
        return _with_gaps(Curve([*every[0]], [*every[0].values()]), key, shown)
    finite = [{x for x, value in points.items() if math.isfinite(value)} for points in every]
    at = sorted(set.intersection(*finite))
    means = [fmean(points[x] for points in every) for x in at]
    halves = [half_width([points[x] for points in every]) for x in at]
    return _with_gaps(Curve(at, means, halves), key, shown)


def half_width(values: Sequence[float]) -> float:
    """Of the interval of the mean of `values`; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    reach = student_quantile(CONFIDENCE, len(values) - 1)
    return reach * stdev(values) / math.sqrt(len(values))


def _points(records: Sequence[Record], key: str) -> Iterator[tuple[float, float]]:
    initial = INITIAL + key.removeprefix(EVAL) if key.startswith(EVAL) else None
    after = 0 if initial is None else 1
    for record in records:
        if initial is not None and initial in record:
            yield float(record["step"]), record[initial]
        if key in record:
            yield float(record["step"] + after), record[key]


def _with_gaps(curve: Curve, key: str, shown: Shown) -> Curve:
    """The curve, broken where a metric of every step was not there for a while, and the internal
    policy's where a phase begins with another.
    """
    if len(curve.at) < 2:
        return curve
    every_step = median(b - a for a, b in pairwise(curve.at)) == 1
    phase_of = {r["step"]: r["policy"] for r in shown.records} if key == INTERNAL_NATS else {}
    gaps = [
        (a + b) / 2
        for a, b in pairwise(curve.at)
        if (every_step and b - a > 1) or phase_of.get(a) != phase_of.get(b)
    ]
    if not gaps:
        return curve
    rows = list(zip(curve.at, curve.values, curve.halves or curve.values, strict=True))
    rows = sorted([*rows, *((gap, math.nan, math.nan) for gap in gaps)], key=lambda row: row[0])
    at, values, halves = (list(column) for column in zip(*rows, strict=True))
    return Curve(at, values, None if curve.halves is None else halves)


def running_total(shown: Shown, key: str) -> Curve | None:
    """What the metric `key` has summed to behind each policy, the mean over seeds; None where a
    step does not have it.
    """
    totals: list[dict[float, float]] = []
    for run in (run for run in shown.runs if run.records):
        total, points = 0.0, {}
        for record in run.records:
            if not math.isfinite(record.get(key, math.nan)):
                return None
            points[float(record["step"])] = total
            total += record[key]
            points[float(record["step"] + 1)] = total
        totals.append(points)
    at = sorted(set.intersection(*map(set, totals))) if totals else []
    return Curve(at, [fmean(points[x] for points in totals) for x in at]) if at else None
