"""The run in one picture: reward and held-out accuracy above, entropies below, phases marked.

The horizontal axis counts the steps behind a policy. What step k records of its rollouts was drawn
after k steps, so it stands at k; held-out accuracy measured at the end of step k stands at k + 1.
"""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import InputError
from megatron_bupo.record.metrics import FILE, internal_layer, read_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

FIGURE = "training.png"
REWARD, ACCURACY, FULL, INTERNAL = "#b4bcc6", "#0b6e4f", "#1f4e9c", "#c8553d"
SHADES = [
    "#fbe9e4",
    "#fdf3e1",
    "#f7efe9",
]  # behind internal phases, in turn; the full policy's is white
LOG_SCALE_FROM = 5.0  # times the full policy's entropy: above, both fit on one axis only in logs


def draw_run(run_dir: str | Path) -> Path:
    """Draw what `run_dir`/metrics.jsonl holds; returns the PNG, `run_dir`/training.png."""

    records = read_metrics(run_dir)
    if not records:
        raise InputError(str(Path(run_dir) / FILE), "has no finished step to draw", "train first")
    figure, (above, below) = panels(records, rows=2, size=(8.5, 6))
    _draw_reward(above, records)
    _draw_entropy(below, records)
    path = Path(run_dir) / FIGURE
    figure.savefig(path)
    return path


def panels(
    records: Sequence[Record], *, rows: int, columns: int = 1, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with empty axes over the run's steps, its phases marked in each and
    named above the uppermost.
    """
    figure, every = empty_panels(rows=rows, columns=columns, size=size)
    over_steps(every[0], records[0]["step"], records[-1]["step"] + 1)
    for axes in every:
        mark_phases(axes, records)
    for axes in every[:columns]:
        name_phases(axes, records)
    for axes in every[-columns:]:
        axes.set_xlabel("steps trained")
    return figure, every


def empty_panels(
    *, rows: int, columns: int, size: tuple[float, float], shared: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with empty axes in the look of all our figures; `shared`: of one
    horizontal axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: no global state, no display, nothing to close.
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    every: list[Axes] = list(figure.subplots(rows, columns, sharex=shared, squeeze=False).flat)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every


def over_steps(axes: Axes, first: int, end: int) -> None:
    """Let the horizontal axis count steps from `first` to `end`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(first, end)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _draw_reward(axes: Axes, records: Sequence[Record]) -> None:
    steps, reward = series(records, "rollout/reward_mean")
    axes.plot(steps, reward, color=REWARD, linewidth=1.2, marker=marker(steps), label="reward")
    window = min(10, max(1, len(records) // 12))
    if window > 1:
        label = f"reward, mean of {window} steps"
        axes.plot(steps, trailing_mean(reward, window), color="#4a5560", linewidth=2, label=label)
    measured = [
        (record["step"] + after, record[key])
        for record in records
        for key, after in (("eval/initial_accuracy_mean", 0), ("eval/accuracy_mean", 1))
        if key in record
    ]
    if measured:
        at, accuracy = zip(*measured, strict=True)
        style = {"color": ACCURACY, "marker": "o", "markersize": 5, "linewidth": 1.6}
        axes.plot(at, accuracy, label="held-out accuracy", clip_on=False, zorder=4, **style)
        for place in {0, len(at) - 1}:
            axes.annotate(
                f"{accuracy[place]:.2f}",
                (at[place], accuracy[place]),
                xytext=(6, -14) if place == 0 else (-4, 8),
                textcoords="offset points",
                ha="left" if place == 0 else "right",
                color=ACCURACY,
                fontsize=9,
            )
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("reward, accuracy")
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _draw_entropy(axes: Axes, records: Sequence[Record]) -> None:
    steps, full = series(records, "entropy/full_nats")
    axes.plot(steps, full, color=FULL, linewidth=1.8, marker=marker(steps), label="full policy")
    highest = 0.0
    label = "internal layer policy of the phase"
    for _, phase in phases(records):
        at, internal = series(phase, "entropy/internal_nats")
        if any(math.isfinite(value) for value in internal):
            axes.plot(at, internal, color=INTERNAL, linewidth=1.8, marker=marker(at), label=label)
            label = None
            highest = max(highest, *(value for value in internal if math.isfinite(value)))
    finite = [value for value in full if math.isfinite(value)]
    if finite and min(finite) > 0 and highest > LOG_SCALE_FROM * max(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("entropy, nats per token")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def mark_phases(axes: Axes, records: Sequence[Record]) -> None:
    """A shade behind every internal phase and a dashed line at every switch."""
    for number, (_, phase) in enumerate(phases(records)):
        first, end = phase[0]["step"], phase[-1]["step"] + 1
        if internal_layer(phase[0]) is not None:
            axes.axvspan(first, end, color=SHADES[number % len(SHADES)], linewidth=0, zorder=0)
        if number > 0:
            axes.axvline(first, color="#6b7280", linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def name_phases(
    axes: Axes, records: Sequence[Record], *, width: float = 0.16, size: float = 10
) -> None:
    """The name of each phase above its beginning, in two rows where it would run into the one
    before; one without room in either is left out. `width`: of a name, as a share of the axis;
    `size`: in points.
    """
    first, end = axes.get_xlim()
    taken = [-1.0, -1.0]  # where each row is free again
    for policy, phase in phases(records):
        start = (phase[0]["step"] - first) / (end - first)
        row = next((row for row in (0, 1) if taken[row] <= start < 1), None)
        if row is None:
            continue
        taken[row] = start + width
        axes.annotate(
            "full policy" if policy == "full" else policy,
            (phase[0]["step"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5 + 1.4 * size * row),
            textcoords="offset points",
            color=FULL if internal_layer(phase[0]) is None else INTERNAL,
            fontsize=size,
        )


def phases(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Consecutive steps that trained one policy, with its name."""
    return [(policy, list(steps)) for policy, steps in groupby(records, lambda r: r["policy"])]


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; NaN, drawn as a gap, where a step does not have it."""
    return [r["step"] for r in records], [r.get(key, math.nan) for r in records]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with the up to `window` - 1 before it; NaN leaves no gap behind it."""
    spans = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    finite = [[value for value in span if math.isfinite(value)] for span in spans]
    return [sum(span) / len(span) if span else math.nan for span in finite]


def marker(steps: Sequence[int]) -> str:
    """Points where a line would be too short to see."""
    return "o" if len(steps) < 3 else ""
