"""Pass@k over k, a curve per benchmark with its interval: `OUT/pass_at_k.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.evaluation.results import Score

COLOURS = ["#1f4e9c", "#c8553d", "#0b6e4f", "#8a5a9e", "#b8860b", "#4a5560"]


def draw_pass_at_k(
    path: Path, scores: Sequence[Score], *, model: str, confidence: float
) -> Path | None:
    """Draw those of `scores` that have Pass@k into the PNG `path`; None: none has."""
    drawn = [score for score in scores if score.pass_at]
    if not drawn:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    # A Figure of its own, not pyplot's: no global state, no display, nothing to close.
    figure = Figure(figsize=(6.5, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, score in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        ks, estimates = list(score.pass_at), list(score.pass_at.values())
        label = f"{score.name} ({score.questions} questions, n={score.responses_per_prompt})"
        values = [100 * estimate.value for estimate in estimates]
        axes.plot(ks, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
        low, high = ([100 * e[end] for e in estimates] for end in (1, 2))
        axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
    every = sorted({k for score in drawn for k in score.pass_at})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(k) for k in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0, top=min(100, axes.get_ylim()[1] * 1.05) or 1)
    axes.set_xlabel("k")
    axes.set_ylabel("Pass@k, %")
    axes.set_title(f"{model}: Pass@k, {confidence:.0%} intervals", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path)
    return path
