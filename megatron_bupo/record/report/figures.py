"""The same charts as PNGs, for papers and messages: a file for each section, all runs on one axis.

One run has the colours of `training.png` behind it, its phases; of several each has a colour, and a
dashed line of it where its policy changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_bupo.record.figure import (
    empty_panels,
    mark_phases,
    name_phases,
    over_steps,
)
from megatron_bupo.record.journal import ACTIVITIES
from megatron_bupo.record.report import charts
from megatron_bupo.record.report.charts import Chart, Profile
from megatron_bupo.record.report.curves import Curve, Shown, curve, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dash = Literal["-", "--", ":", "-."]
COLOURS = "#1f4e9c #c8553d #0b6e4f #7a3e9d #b07a00 #1f8f9c #a8326b #5f6b2e".split()
OTHER = "#c5ccd4"  # of a step's time
DASHES: list[Dash] = ["-", "--", ":", "-."]
COLUMNS = 3
LOG_FROM = 50.0  # times the median: one value far above all others would press them flat
PROFILES_DRAWN = 6  # runs side by side: more are too small to read, and the page has them


def draw_figures(folder: Path, shown: Sequence[Shown]) -> list[Path]:
    """Draw every section that there is something in, as `folder`/NAME.png."""
    shown = [one for one in shown if any(run.records for run in one.runs)]
    figures = {s.name: _section(s.charts, shown) for s in charts.sections(shown)}
    layers = _layers(shown)
    if layers is not None:
        figures["layers"] = layers
    if any(charts.seconds_per_step(one) for one in shown):
        figures["time_split"] = _time_split(shown)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _section(drawn: Sequence[Chart], shown: Sequence[Shown]) -> Figure:
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    width = 4.6 * columns + 0.4
    side_by_side = _names_in_a_row(shown, width)
    above = 0.1 + 0.25 * -(-len(shown) // side_by_side) if len(shown) > 1 else 0.0
    size = (width, 3.2 * rows + above)
    figure, every = empty_panels(rows=rows, columns=columns, size=size, shared=False)
    for axes, chart in zip(every, drawn, strict=False):
        _chart(axes, chart, shown)
    for axes in every[len(drawn) :]:
        axes.set_visible(False)
    if len(shown) > 1:
        _runs_above(figure, shown, side_by_side)
    return figure


def _names_in_a_row(shown: Sequence[Shown], width: float) -> int:
    """How many names of runs, each behind its line, fit side by side into `width` inches."""
    longest = max(len(one.name) for one in shown)
    return min(len(shown), max(1, int(width / (0.75 + 0.09 * longest))))


def _runs_above(figure: Figure, shown: Sequence[Shown], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(i), linestyle=_dash(i)) for i in range(len(shown))]
    names = [_plain(one.name) for one in shown]
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)


def _plain(name: str) -> str:
    """`name` as it is: dollars would begin a formula."""
    return name.replace("$", r"\$")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int) -> Dash:
    return DASHES[number // len(COLOURS) % len(DASHES)]


def _chart(axes: Axes, chart: Chart, shown: Sequence[Shown]) -> None:
    early = charts.early_steps(shown) if chart.early else None
    several = len(shown) > 1
    last = early or max(one.records[-1]["step"] + 1 for one in shown)
    values: list[float] = []
    for number, one in enumerate(shown):
        for place, (key, label) in enumerate(chart.lines):
            drawn = _until(curve(one, key), early)
            if not charts.is_drawn(drawn):
                continue
            values += [value for value in drawn.values if math.isfinite(value)]
            dash = DASHES[place % len(DASHES)] if several and place else _dash(number)
            colour = _colour(number if several else place)
            name = "" if several and number else label
            if chart.noisy:
                axes.plot(drawn.at, drawn.values, color=colour, alpha=0.3, linewidth=0.9)
                drawn = _until(smoothed(one, key), early)
            _line(axes, drawn, colour, dash, name, last=last)
    over_steps(axes, 0, last)
    _mark(axes, shown)
    axes.set_xlabel("steps trained")
    axes.set_title(chart.title, fontsize=10, loc="left", pad=6 if several else 30)
    if min(values) > 0 and max(values) > LOG_FROM * sorted(values)[len(values) // 2]:
        axes.set_yscale("log")
    elif chart.least is not None and axes.get_ylim()[0] < chart.least + abs(max(values)):
        axes.set_ylim(bottom=min(chart.least, *values))
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8, handlelength=3)  # room to see dashes in


def _until(of: Curve, end: int | None) -> Curve:
    if end is None:
        return of
    kept = sum(x <= end for x in of.at)
    return Curve(of.at[:kept], of.values[:kept], of.halves and of.halves[:kept])


def _line(axes: Axes, of: Curve, colour: str, dash: Dash, name: str, *, last: int) -> None:
    apart = len(of.at) * last <= 45 * (of.at[-1] - of.at[0] or last)  # points can be told apart
    style = {"color": colour, "marker": "o" if apart else "", "markersize": 3.5}
    axes.plot(of.at, of.values, linestyle=dash, linewidth=1.6, label=name or None, **style)
    if of.halves is not None:
        low, high = (
            [y + sign * h for y, h in zip(of.values, of.halves, strict=True)] for sign in (-1, 1)
        )
        axes.fill_between(of.at, low, high, color=colour, alpha=0.16, linewidth=0)


def _mark(axes: Axes, shown: Sequence[Shown]) -> None:
    """Where the policy that learns is another."""
    if len(shown) == 1:
        mark_phases(axes, shown[0].records)
        if len(charts.phase_spans(shown[0])) > 1:
            name_phases(axes, shown[0].records, width=0.27, size=8)
        return
    for step, places in charts.switches(shown).items():
        for turn, number in enumerate(places):  # dashes between each other's
            dash = (4 * turn, (4, 4 * len(places) - 1))
            axes.axvline(step, color=_colour(number), linewidth=1, linestyle=dash, zorder=1)


def _layers(shown: Sequence[Shown]) -> Figure | None:
    """The paper's Figure 4: a line over layers for each probe."""
    every = [(title, charts.profiles(shown, pattern)) for title, pattern in charts.PROFILES]
    every = [(title, found[:PROFILES_DRAWN]) for title, found in every if found]
    if not every:
        return None
    columns = max(len(found) for _, found in every)
    size = (4.6 * columns + 1.2, 3.3 * len(every))
    figure, panels = empty_panels(rows=len(every), columns=columns, size=size, shared=False)
    for place, (title, found) in enumerate(every):
        row = panels[place * columns : (place + 1) * columns]
        finite = [y for run in found for line in run.values for y in line if math.isfinite(y)]
        for axes, run in zip(row, found, strict=False):
            _profile(figure, axes, run)
            axes.set_ylim(*_room(finite))
            name = f"{_plain(run.name)}: {title}" if len(shown) > 1 else title
            axes.set_title(name.replace("h_l", "$h_l$"), fontsize=10, loc="left")
        for axes in row[len(found) :]:
            axes.set_visible(False)
    return figure


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _profile(figure: Figure, axes: Axes, run: Profile) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    span = Normalize(run.steps[0], max(run.steps[-1], run.steps[0] + 1))
    shades = colormaps["viridis"]
    for step, values in zip(run.steps, run.values, strict=True):
        style = {"color": shades(float(span(step))), "marker": "o", "markersize": 2.5}
        axes.plot(run.layers, values, linewidth=1.3, **style)
    axes.set_xlabel("later layer j")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    figure.colorbar(ScalarMappable(span, shades), ax=axes, label="steps trained", pad=0.02)


def _time_split(shown: Sequence[Shown]) -> Figure:
    figure, (axes,) = empty_panels(rows=1, columns=1, size=(8.5, 1.6 + 0.34 * len(shown)))
    parts = [charts.seconds_per_step(one) for one in shown]
    names = [name for name in [*ACTIVITIES, "other"] if any(part.get(name) for part in parts)]
    for number, name in enumerate(names):
        widths = [part.get(name, 0.0) for part in parts]
        before = [sum(part.get(n, 0.0) for n in names[:number]) for part in parts]
        colour = OTHER if name == "other" else _colour(number)
        label = ACTIVITIES.get(name, name)
        axes.barh(range(len(shown)), widths, left=before, color=colour, label=label)
    axes.set_yticks(range(len(shown)), [_plain(one.name) for one in shown])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axes.set_xlabel("seconds of a step, mean")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure
