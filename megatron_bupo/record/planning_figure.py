"""How does planning go on in a run? What planning and execution tokens are like, how varied the
grams are, and how far planning tokens are those of high entropy; phases marked as in training.png.
"""

from __future__ import annotations

import math
from pathlib import Path

from megatron_bupo.record.figure import marker, panels, series
from megatron_bupo.record.metrics import read_metrics

FIGURE = "planning.png"
PLANNING, EXECUTION, CLUSTERS, FOLLOWING = "#7a3e9d", "#8a949e", "#0b6e4f", "#c8553d"

# Of each panel the axis, its least value, and of each line metric, label and colour
PANELS: list[tuple[str, float, list[tuple[str, str, str]]]] = [
    (
        "entropy, nats per token",
        0.0,
        [
            ("hicra/planning_entropy_nats", "planning tokens", PLANNING),
            ("hicra/execution_entropy_nats", "execution tokens", EXECUTION),
        ],
    ),
    (
        "perplexity",
        1.0,
        [
            ("hicra/planning_perplexity", "planning tokens", PLANNING),
            ("hicra/execution_perplexity", "execution tokens", EXECUTION),
        ],
    ),
    (
        "entropy of frequencies, nats",
        0.0,
        [
            ("hicra/semantic_entropy_nats", "strategic grams", PLANNING),
            ("hicra/semantic_cluster_entropy_nats", "their clusters", CLUSTERS),
            ("hicra/following_entropy_nats", "the next word, given the gram", FOLLOWING),
        ],
    ),
    (
        "share of tokens",
        0.0,
        [
            ("hicra/planning_tokens_fraction", "planning, of all", EXECUTION),
            ("hicra/forks_among_planning_fraction", "high-entropy, of planning", PLANNING),
            ("hicra/planning_among_forks_fraction", "planning, of high-entropy", FOLLOWING),
        ],
    ),
]


def draw_planning(run_dir: str | Path) -> Path | None:
    """Draw what `run_dir`/metrics.jsonl says of planning; returns the PNG, `run_dir`/planning.png.
    None: it says nothing.
    """
    records = read_metrics(run_dir)
    if not any("hicra/planning_tokens_fraction" in record for record in records):
        return None
    figure, every = panels(records, rows=2, columns=2, size=(12, 6.5))
    for axes, (label, least, lines) in zip(every, PANELS, strict=True):
        axes.set_ylabel(label)
        for key, name, color in lines:
            steps, values = series(records, key)
            if any(map(math.isfinite, values)):
                style = {"color": color, "linewidth": 1.6, "marker": marker(steps)}
                axes.plot(steps, values, label=name, **style)
        if axes.get_legend_handles_labels()[0]:
            axes.set_ylim(bottom=least)
            axes.legend(loc="best", frameon=False, fontsize=9)
    path = Path(run_dir) / FIGURE
    figure.savefig(path)
    return path
