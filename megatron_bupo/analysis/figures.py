"""The analysis in pictures: what `analysis.json` says, over the layers, counted from 1.

::

    figures/entropy_flow.png, .pdf      a layer's input -> attention -> FFN -> output (the paper's
                                        Figure 2)
    figures/entropy_change              what attention and FFN do to entropy (Figure 3)
    figures/layer_entropy               entropies of the layer policies, under both read-outs
    figures/full_policy                 how far the layer policies are from the full policy
    figures/cosine                      where modules point (appendix B.5)

Bands are the intervals of the means. The stages of the FFNs are shaded, the recommended layer is
the dashed line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_bupo.analysis.moments import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "figures"
ATTENTION, FFN, LAYER, NORMED, FULL = "#7a3e9d", "#0b6e4f", "#1f4e9c", "#c8553d", "#4a5560"
SHADES = {"exploration": "#fbe9d9", "integration": "#eef0f3", "convergence": "#dfeaf7"}
RAW_LABEL, NORM_LABEL = "raw read-out", "through the final norm"
_WIDTH = 8.5  # inches
_NAMED_FROM = 0.1  # of the width: narrower stages have their initial alone
_ALL_NAMED = 48  # layers that have room for all of their numbers

Content = Mapping[str, Any]


def draw_figures(out: Path, content: Content) -> list[Path]:
    """Draw all of them into `out`/figures; the PNGs."""
    figures = {
        "entropy_flow": _entropy_flow(content),
        "entropy_change": _entropy_change(content),
        "layer_entropy": _layer_entropy(content),
        "full_policy": _full_policy(content),
        "cosine": _cosine(content),
    }
    (out / FOLDER).mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):  # the same to the bit
            paths.append(out / FOLDER / f"{name}.{kind}")
            figure.savefig(paths[-1], metadata=metadata)
    return paths[1::2]


def _entropy_change(content: Content) -> Figure:
    figure, (above, below) = _panels(content, rows=2, height=6)
    for axes, what, color in ((above, "attention", ATTENTION), (below, "ffn", FFN)):
        _line(axes, content, f"{what}_entropy_change_nats", color=color)
        axes.axhline(0, color="#6b7280", linewidth=0.9)
    above.set_ylabel(r"$\Delta H$ of attention, nats")
    below.set_ylabel(r"$\Delta H$ of FFN, nats")
    low, high = content["stages"]["about_zero_nats"]
    style = {"color": "#6b7280", "linewidth": 0.9, "linestyle": (0, (1, 2))}
    below.axhline(high, label="about 0 is between these", **style)
    below.axhline(low, **style)
    below.legend(loc="best", frameon=False, fontsize=9)
    return figure


def _layer_entropy(content: Content) -> Figure:
    figure, (axes,) = _panels(content, rows=1, height=3.8)
    for prefix, label, style in _read_outs(content):
        _line(axes, content, f"{prefix}entropy_nats", label=label, **style)
    full = content["full_policy"]["entropy_nats"]
    axes.axhline(full, color=FULL, linewidth=1.2, linestyle=(0, (2, 2)), label="full policy")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("entropy of the layer policy, nats")
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def _entropy_flow(content: Content) -> Figure:
    """As the authors draw it: a layer takes three steps, its output is the next one's input."""
    figure, (axes,) = _panels(content, rows=1, height=4.6, at=0.5, note="")
    flow = entropy_flow(content)
    layers = len(flow)
    x = np.arange(layers)[:, None] + np.array([0.5, 0.5 + 1 / 3, 0.5 + 2 / 3, 1.5])
    axes.plot(x.ravel(), flow.ravel(), color="#a9b1bb", linewidth=1.1)
    size = float(np.clip(150 / layers, 2, 5))
    style = {"linestyle": "", "markersize": size}
    stream = np.append(x[:, 0], x[-1, 3]), np.append(flow[:, 0], flow[-1, 3])
    axes.plot(*stream, color=LAYER, marker="o", label="residual stream, between layers", **style)
    axes.plot(x[:, 1], flow[:, 1], color=ATTENTION, marker="^", label="attention output", **style)
    axes.plot(x[:, 2], flow[:, 2], color=FFN, marker="s", label="FFN output", **style)
    axes.set_xlim(0.3, layers + 0.7)
    if layers <= _ALL_NAMED:
        axes.set_xticks(range(1, layers + 1))
        axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("entropy, nats")
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def entropy_flow(content: Content) -> Array:
    """Entropies of input, attention output, FFN output and output, nats `[layers, 4]`."""
    layers = content["layers"]
    after = [layer["entropy_nats"] for layer in layers]
    before = [content["embedding"]["entropy_nats"], *after[:-1]]
    attention, ffn = ([r[f"{what}_entropy_nats"] for r in layers] for what in ("attention", "ffn"))
    return np.array([before, attention, ffn, after], dtype=float).T


def _full_policy(content: Content) -> Figure:
    names = {
        "kl_to_full_nats": "KL(layer || full), nats",
        "kl_from_full_nats": "KL(full || layer), nats",
        "top1_agreement": "same most probable token",
    }
    figure, every = _panels(content, rows=len(names), height=7.5)
    for axes, (key, name) in zip(every, names.items(), strict=True):
        for prefix, label, style in _read_outs(content):
            _line(axes, content, f"{prefix}{key}", label=label, **style)
        axes.set_ylim(bottom=0, top=1.03 if key == "top1_agreement" else None)
        axes.set_ylabel(name)
    every[0].legend(loc="best", frameon=False, fontsize=9)
    return figure


def _cosine(content: Content) -> Figure:
    figure, (axes,) = _panels(content, rows=1, height=3.8)
    _line(
        axes,
        content,
        "attention_cosine",
        color=ATTENTION,
        label="attention output, its input stream",
    )
    _line(axes, content, "ffn_cosine", color=FFN, label="FFN output, its input stream")
    axes.axhline(0, color="#6b7280", linewidth=0.9)
    axes.set_ylabel("cosine")
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def _read_outs(content: Content) -> list[tuple[str, str, dict[str, Any]]]:
    """Of each read-out the prefix of its columns, its label, and how its line looks."""
    normed = {"color": NORMED, "linestyle": (0, (3, 1.5))}
    if content["read_out"] == "norm":
        return [("", NORM_LABEL, normed)]
    return [("", RAW_LABEL, {"color": LAYER}), ("normed_", NORM_LABEL, normed)]


def _line(axes: Axes, content: Content, key: str, *, color: str, **style: Any) -> None:
    """A column over the layers, with the band of its intervals."""
    layers = content["layers"]
    x = [layer["layer"] for layer in layers]
    low, high = np.array([layer["interval"][key] for layer in layers], dtype=float).T
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    style = {"linewidth": 1.7, "marker": "o", "markersize": 3 if len(x) > 12 else 4.5} | style
    axes.plot(x, [layer[key] for layer in layers], color=color, **style)


def _panels(
    content: Content, *, rows: int, height: float, at: float = 0.0, note: str | None = None
) -> tuple[Figure, Sequence[Axes]]:
    """Empty axes over the layers, one below the other, with the stages shaded; what is said of a
    layer stands `at` right of its number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    every: list[Axes] = list(figure.subplots(rows, 1, sharex=True, squeeze=False).flat)
    layers = len(content["layers"])
    for axes in every:
        _mark(axes, content, at)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    _name(every[0], content, at)
    every[0].set_xlim(0.4, layers + 0.6)
    every[0].set_xticks(layer_ticks(layers))
    data, name = content["data"], content["model"].replace("$", r"\$")
    if note is None:
        note = f"; bands: {content['confidence']:.0%} intervals"
    every[-1].set_xlabel(
        f"layer of {name}    ({data['tokens']} tokens of {data['responses']} responses{note})"
    )
    return figure, every


def layer_ticks(layers: int) -> list[int]:
    """The first and the last of `layers`, and round numbers between: at most 12."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if layers <= 10 * step)
    between = range(step, layers, step)
    return sorted({1, *(i for i in between if min(i - 1, layers - i) > step / 2), layers})


def _mark(axes: Axes, content: Content, at: float) -> None:
    """A shade behind each stage, and a line at the recommended layer."""
    for region in content["stages"]["regions"]:
        ends = region["first_layer"] - 0.5, region["last_layer"] + 0.5
        axes.axvspan(*ends, color=SHADES[region["stage"]], linewidth=0, zorder=0)
    if content["recommendation"] is not None:
        layer = content["recommendation"]["target_layer"]
        axes.axvline(layer + at, color="#1b2026", linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _name(axes: Axes, content: Content, at: float) -> None:
    """The stages above the uppermost axes."""
    layers = len(content["layers"])
    for region in content["stages"]["regions"]:
        first, last, name = region["first_layer"], region["last_layer"], region["stage"]
        narrow = (last - first + 1) / layers < _NAMED_FROM
        axes.annotate(
            f"{name[0].upper()}." if narrow else name,
            ((first + last) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#4a5560",
        )
    if content["recommendation"] is not None:
        layer = content["recommendation"]["target_layer"]
        axes.annotate(
            f"layer {layer}",
            (layer + at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 17),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#1b2026",
        )
