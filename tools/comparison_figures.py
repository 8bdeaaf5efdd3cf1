"""A comparison in pictures: learning curves, entropies, and differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tools.comparison_statistics import CONFIDENCE, Curve
from tools.comparison_tables import Accuracy, Comparison, Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE = "#4a5560"
COLOURS = ["#0b6e4f", "#c8553d", "#1f4e9c", "#b8860b", "#8a5a9e", "#2a9d8f"]
PLAIN, BEYOND = "#8b95a1", "#c8553d"
COLUMNS = 3


class Drawn(NamedTuple):
    """What of a run is drawn over the steps that it has trained."""

    label: str
    of: Callable[[Curve], tuple[Sequence[float], Sequence[float]]]


ACCURACY = Drawn("held-out accuracy", lambda run: (run.steps, run.accuracy))
ENTROPY = Drawn(
    "entropy of the full policy, nats",
    lambda run: (range(len(run.entropy)), run.entropy),
)
PERPLEXITY = Drawn(
    "perplexity of the full policy, on fixed texts",
    lambda run: (run.probed, run.perplexity),
)


def draw(
    out: Path, comparison: Comparison, curves: Curves, panels: Mapping[str, Sequence[str]]
) -> list[Path]:
    """The PNGs, of a reference and others."""
    shown = {title: [name for name in names if name in curves] for title, names in panels.items()}
    reference = comparison.rows[0].method.name
    shown = {title: names for title, names in shown.items() if set(names) - {reference}}
    if not shown:
        return []
    figures = {
        "differences": _differences(comparison, shown),
        "learning_curves": _panels(curves, shown, reference, ACCURACY),
        "entropies": _panels(curves, shown, reference, ENTROPY),
    }
    if all(run.probed for of in curves.values() for run in of.values()):
        figures["perplexities"] = _panels(curves, shown, reference, PERPLEXITY)
    return [_save(figure, out / f"{name}.png") for name, figure in figures.items()]


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def _panels(
    curves: Curves,
    panels: Mapping[str, Sequence[str]],
    reference: str,
    drawn: Drawn,
) -> Figure:
    """Means over seeds with a band of one standard deviation, the reference in every panel; below
    them where guards ended internal phases.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colour_of = {reference: REFERENCE}
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        free = [c for c in COLOURS if c not in {colour_of.get(name) for name in names}]
        for place, name in enumerate([reference, *(n for n in names if n != reference)]):
            if name not in colour_of:
                colour_of[name] = free.pop(0) if free else COLOURS[0]
            _band(axes, [drawn.of(run) for run in curves[name].values()], colour_of[name], name)
            _mark(axes, [run.left_at for run in curves[name].values()], colour_of[name], place)
        axes.set_title(title, fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="best")
        _plain(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for place, axes in enumerate(grid):
        if place % columns == 0:
            axes.set_ylabel(drawn.label)
        if place + columns >= len(panels):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("steps trained")
    return figure


def _band(
    axes: Axes, runs: Sequence[tuple[Sequence[float], Sequence[float]]], colour: str, name: str
) -> None:
    at, values = runs[0][0], np.array([values for _, values in runs])
    mean = values.mean(0)
    axes.plot(at, mean, color=colour, linewidth=1.8, label=name)
    if len(runs) > 1:
        sd = values.std(0, ddof=1)
        axes.fill_between(at, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)


def _mark(axes: Axes, left_at: Sequence[int | None], colour: str, row: int) -> None:
    at = [step for step in left_at if step is not None]
    style = {"marker": "^", "s": 26, "color": colour, "linewidths": 0}
    axes.scatter(at, [0.035 * row] * len(at), transform=axes.get_xaxis_transform(), **style)


def _differences(comparison: Comparison, panels: Mapping[str, Sequence[str]]) -> Figure:
    """A row for each method: its difference to the reference at equal steps and at equal tokens;
    a shade behind every other panel's.
    """
    from matplotlib.figure import Figure

    rows, reference = comparison.rows[1:], comparison.rows[0].method.name
    names = [row.method.name for row in rows]
    panel_of = {name: i for i, of in reversed([*enumerate(panels.values())]) for name in of}
    figure = Figure(figsize=(10, 1.7 + 0.27 * len(rows)), layout="constrained", dpi=130)
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    _forest(both[0], [row.at_steps for row in rows], f"after {comparison.steps} steps")
    tokens = f"after {comparison.budget:,.0f} response tokens"
    _forest(both[1], [row.at_tokens for row in rows], tokens)
    for axes in both:
        for place in (i for i, name in enumerate(names) if panel_of[name] % 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
    both[0].set_yticks(range(len(rows)), names, fontsize=9)
    both[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(
        f"held-out accuracy \u2212 that of {reference}, paired by seed, {CONFIDENCE:.0%} "
        "intervals; coloured where they exclude 0",
        fontsize=10,
    )
    return figure


def _forest(axes: Axes, accuracies: Sequence[Accuracy], title: str) -> None:
    axes.axvline(0, color=REFERENCE, linewidth=1, linestyle=(0, (4, 3)))
    for place, accuracy in enumerate(accuracies):
        difference = accuracy.to_reference
        if difference is None:
            continue
        half = 0.0 if math.isnan(difference.half) else difference.half
        style = {"color": BEYOND if difference.stars else PLAIN, "markersize": 5, "capsize": 2}
        axes.errorbar(difference.mean, place, xerr=half, fmt="o", **style)
    axes.set_title(title, fontsize=10, loc="left")
    axes.locator_params(axis="x", nbins=6)
    _plain(axes, grid="x")


def _plain(axes: Axes, *, grid: Any = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
