"""Which lines stand together? The charts of the page and of the figures, and which of them there is
something to draw in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_bupo.record.figure import phases
from megatron_bupo.record.journal import ACTIVITIES
from megatron_bupo.record.metrics import internal_layer
from megatron_bupo.record.planning_figure import PANELS
from megatron_bupo.record.report.curves import Curve, Shown, curve, metric_names
from megatron_bupo.record.summary import AVG_AT_K

Line = tuple[str, str]  # metric, and what it is called beside the others of its chart

OUTSIDE = ("checkpoint", "relayout", "export")  # what happens between steps


@dataclass(frozen=True)
class Chart:
    """Lines on one axis; where runs have the colours, those after the first are dashed."""

    title: str
    lines: tuple[Line, ...]
    least: float | None = None  # that the axis includes
    early: bool = False  # ends after `early_steps`
    noisy: bool = False  # its trailing mean is drawn, over the values themselves


@dataclass(frozen=True)
class Section:
    """Charts under one heading, and in one figure."""

    name: str  # of its file
    title: str
    about: str
    charts: tuple[Chart, ...]


def one(title: str, key: str, least: float | None = None, **more: bool) -> Chart:
    """A chart of one metric."""
    return Chart(title, ((key, ""),), least, **more)


SECTIONS = (
    Section(
        "learning",
        "Learning",
        "held-out accuracy and reward",
        (
            one("Held-out accuracy", "eval/accuracy_mean"),
            one("Reward, mean over the step's responses", "rollout/reward_mean", noisy=True),
            one(
                "Groups whose rewards differ, share",
                "rollout/groups_with_signal_fraction",
                noisy=True,
            ),
        ),
    ),
    Section(
        "entropy",
        "Entropy",
        "nats per token, at the step's responses (the paper's Figure 7)",
        (
            one("Full policy", "entropy/full_nats", 0.0),
            one("Full policy, the early part", "entropy/full_nats", 0.0, early=True),
            one("Internal layer policy of the phase", "entropy/internal_nats", 0.0),
        ),
    ),
    Section(
        "internal_policy",
        "Internal and full policy",
        "on texts and prompts that stay the same (the paper's Figure 5)",
        (
            one("Perplexity of the full policy", "probe/perplexity", 1.0),
            one("KL(internal || full), nats", "probe/kl_internal_to_full_nats", 0.0),
            one("KL(full || internal), nats", "probe/kl_full_to_internal_nats", 0.0),
            one("ΔH of the layer: H(output) - H(input), nats", "probe/layer_entropy_change_nats"),
            one("Entropy of the internal policy, nats", "probe/internal_entropy_nats", 0.0),
            one("Entropy of the full policy, nats", "probe/full_entropy_nats", 0.0),
            Chart(
                "Response length, tokens",
                (
                    ("rollout/response_tokens_mean", "training prompts"),
                    ("probe/response_tokens_mean", "fixed prompts"),
                ),
                0.0,
            ),
            Chart(
                "Responses cut at the limit, share",
                (
                    ("rollout/truncated_fraction", "training prompts"),
                    ("probe/truncated_fraction", "fixed prompts"),
                ),
                0.0,
            ),
            one("Repeated 4-grams, share", "probe/repetition_fraction", 0.0),
        ),
    ),
    Section(
        "updates",
        "Updates",
        "of the policy that learns, means over a step's updates",
        (
            one("Gradient norm before clipping", "update/grad_norm", 0.0),
            one("Tokens whose ratio is clipped, share", "update/ratio_clipped_fraction", 0.0),
            one("KL to the policy before the step, nats", "update/kl_to_old_nats"),
            one("KL to the reference, nats", "update/kl_to_reference_nats"),
            one("Learning rate", "update/learning_rate", 0.0),
            one("Updates left out", "update/skipped", 0.0),
            one("Trainer and sampler apart, nats per token", "rollout/logprob_gap_mean_nats", 0.0),
        ),
    ),
    Section(
        "critic",
        "Critic",
        "of PPO",
        (
            one("Explained variance of the returns", "critic/explained_variance"),
            one("Loss of the values", "critic/value_loss", 0.0),
            Chart(
                "Values and returns, means",
                (("critic/values_mean", "values"), ("critic/returns_mean", "returns")),
            ),
            one("Gradient norm before clipping", "critic/grad_norm", 0.0),
        ),
    ),
    Section(
        "hicra",
        "Planning tokens",
        "of strategic grams (HICRA)",
        tuple(
            Chart(label[0].upper() + label[1:], tuple((key, name) for key, name, _ in lines), least)
            for label, least, lines in PANELS
        ),
    ),
    Section("time", "Time", "what steps take", (one("Seconds per step", "time/step_s", 0.0),)),
)

PROFILES = (  # over layers, a line for each probe: the paper's Figure 4
    ("Cosine of h_l with later layers", re.compile(r"probe/cosine_to_layer_(\d+)")),
    ("KL(π_l || π_j) to later layers, nats", re.compile(r"probe/kl_to_layer_(\d+)_nats")),
)


def sections(shown: Sequence[Shown]) -> list[Section]:
    """Those that there is something to draw in, without lines that no run has."""
    names = set(metric_names(shown))
    drawn = {key for key in names if any(is_drawn(curve(run, key)) for run in shown)}
    early = early_steps(shown)
    kept = []
    for section in SECTIONS:
        charts = section.charts
        if section.name == "learning":
            charts = (*charts[:1], *_benchmarks(names), *charts[1:])
        if section.name == "internal_policy":
            charts = (*charts, *_of_one_layer(shown))
        there = [
            replace(chart, lines=lines)
            for chart in charts
            if (lines := tuple(line for line in chart.lines if line[0] in drawn))
            and (early is not None or not chart.early)
        ]
        if there:
            kept.append(replace(section, charts=tuple(there)))
    return kept


def is_drawn(of: Curve) -> bool:
    """Is there a point?"""
    return any(math.isfinite(value) for value in of.values)


def _benchmarks(names: set[str]) -> list[Chart]:
    """A chart for each benchmark, where there are several."""
    matches = [(match[1], key) for key in sorted(names) if (match := AVG_AT_K.fullmatch(key))]
    if len(matches) < 2:
        return []
    return [one(f"{name}, Avg@{key.rpartition('_')[2]}", key) for name, key in matches]


def early_steps(shown: Sequence[Shown]) -> int | None:
    """Where the early part ends: when full policies have trained for as long as internal ones did,
    or after a fifth of the run. None: all of the run is its early part.
    """
    longest = max(run.records[-1]["step"] + 1 for run in shown if run.records)
    internal = [
        r["step"] + 1 for run in shown for r in run.records if internal_layer(r) is not None
    ]
    end = max(10, 2 * max(internal)) if internal else max(10, longest // 5)
    return end if end < 0.7 * longest else None


@dataclass(frozen=True)
class Profile:
    """What each probe of a run found over `layers`: `values` `[probes, layers]`, NaN: not there."""

    name: str
    steps: list[int]
    layers: list[int]
    values: list[list[float]]


def profiles(shown: Sequence[Shown], pattern: re.Pattern[str]) -> list[Profile]:
    """Of every run that was probed for the metrics of `pattern`, whose group is the layer, at more
    than one.
    """
    found, keys = [], _by_layer(shown, pattern)
    for run in shown:
        curves = {layer: curve(run, key) for layer, key in sorted(keys.items())}
        at = {n: dict(zip(c.at, c.values, strict=True)) for n, c in curves.items() if is_drawn(c)}
        steps = sorted({x for points in at.values() for x, y in points.items() if math.isfinite(y)})
        if steps and len(at) > 1:
            values = [[points.get(x, math.nan) for points in at.values()] for x in steps]
            found.append(Profile(run.name, [int(x) for x in steps], list(at), values))
    return found


def _by_layer(shown: Sequence[Shown], pattern: re.Pattern[str]) -> dict[int, str]:
    return {int(m[1]): key for key in metric_names(shown) if (m := pattern.fullmatch(key))}


def _of_one_layer(shown: Sequence[Shown]) -> list[Chart]:
    """What has no profile over layers, because there is but one above: over steps."""
    every = [(title, _by_layer(shown, pattern)) for title, pattern in PROFILES]
    return [
        one(title.replace("later layers", f"layer {layer}"), key)
        for title, keys in every
        if len(keys) == 1
        for layer, key in keys.items()
    ]


def seconds_per_step(run: Shown) -> dict[str, float]:
    """What a step spends its time with, mean seconds: activities, the rest of the step as `other`,
    and what happens between steps.
    """
    records = [record for one in run.runs for record in one.records if "time/step_s" in record]
    if not records:
        return {}

    def mean(key: str) -> float:
        values = [record.get(key, 0.0) for record in records]
        return fmean(value if math.isfinite(value) else 0.0 for value in values)

    parts = {name: seconds for name in ACTIVITIES if (seconds := mean(f"time/{name}_s")) > 0}
    within = sum(seconds for name, seconds in parts.items() if name not in OUTSIDE)
    other = max(0.0, mean("time/step_s") - within)
    return {**parts, "other": other} if within or other else {}


def switches(shown: Sequence[Shown]) -> dict[int, list[int]]:
    """The steps with which another policy begins to learn, and whose, as places in `shown`."""
    found: dict[int, list[int]] = {}
    for place, run in enumerate(shown):
        for _, _, first, _ in phase_spans(run)[1:]:
            found.setdefault(first, []).append(place)
    return found


def phase_spans(run: Shown) -> list[tuple[str, int | None, int, int]]:
    """Of the run's phases the policy, its layer (None: it is no internal one), first step and
    end.
    """
    return [
        (policy, internal_layer(steps[0]), steps[0]["step"], steps[-1]["step"] + 1)
        for policy, steps in phases(run.records)
    ]
