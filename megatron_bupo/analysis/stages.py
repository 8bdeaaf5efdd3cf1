"""Which layers explore, integrate and converge, and which one should BuPO train first?

The paper looks at what FFNs do to entropy (arXiv 2512.19673, 3.2): in Qwen3 dH_ffn is above 0 in
the lowest layers (exploration), about 0 in the middle (integration) and below 0 at the top
(convergence); and it trains the boundary layer, the last with dH_ffn > 0 (5.3). Other models have
other curves, and every curve has odd layers. So regions are fitted, in absolute distance, which a
single layer does not turn::

    exploration  layers 1..a    nearest to max( dH_ffn, 0) is: a level p in them, 0 above
    convergence  layers b..c    nearest to max(-dH_ffn, 0) is: a level n in them, 0 elsewhere, b > a
    integration  layers between, or all above exploration; none where nothing explores

Levels are medians, so that a layer is "about 0" where it is nearer to 0 than to the level of the
region next to it: dH_ffn in [-n/2, p/2]. A level counts if it is larger than the noise: what layers
differ by from the middle of their two neighbours (the median), or by chance (the median half-width
of their intervals). One layer alone does not explore: noise looks like that too.

The last layer's policy is not an internal one, so a model that explores to its end is trained at
L - 1, as is one that does not explore at all: the paper's Llama models are, at 27 of 28 and 31 of
32. How much of that hangs on the responses shows in draws of as many, with replacement.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bupo.analysis.moments import Array, Moments, pooled

COLUMN = "ffn_entropy_change_nats"
DRAWS = 400
EXPLORATION, INTEGRATION, CONVERGENCE = "exploration", "integration", "convergence"


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last`, from 1, and the median of their dH_ffn in nats."""

    name: str
    first: int
    last: int
    change: float


@dataclass(frozen=True)
class Stages:
    """Of a model, from below; none: its FFNs follow no such pattern. Nats."""

    stages: tuple[Stage, ...]
    noise: float
    low: float  # dH_ffn is about 0 between these two
    high: float

    @property
    def exploration(self) -> Stage | None:
        """The lowest stage, if it is that one."""
        first = self.stages[0] if self.stages else None
        return first if first is not None and first.name == EXPLORATION else None


@dataclass(frozen=True)
class Recommendation:
    """A layer to train, and why. `shares`: how often each layer was that of a draw of responses,
    the most frequent first; empty: there is one response.
    """

    layer: int
    by_rule: bool  # the paper's; False: the fallback
    reason: str
    shares: dict[int, float]
    last_above_zero: int | None  # the last layer whose dH_ffn is, with its whole interval


def find_stages(changes: Array, half_widths: Array | None = None) -> Stages:
    """Of dH_ffn `[layers]` in nats and the half-widths of their intervals; None, NaN: not known."""
    noise = noise_of(changes, half_widths)
    end = int(exploration_ends(changes[None], noise)[0])
    first, last = _convergence(changes, end, noise)
    bounds = [(EXPLORATION, 0, end), (CONVERGENCE, first, last)]
    if end:
        bounds.insert(1, (INTEGRATION, end, first))
    stages = tuple(
        Stage(name, start + 1, stop, float(np.median(changes[start:stop])))
        for name, start, stop in bounds
        if stop > start
    )
    level = {stage.name: abs(stage.change) / 2 for stage in stages}
    low, high = level.get(CONVERGENCE, noise), level.get(EXPLORATION, noise)
    return Stages(stages, noise, -low if low else 0.0, high)


def noise_of(changes: Array, half_widths: Array | None = None) -> float:
    """What a layer's dH_ffn has to be larger than, to be a level."""
    rough = np.abs(changes[1:-1] - (changes[:-2] + changes[2:]) / 2)
    by_chance = np.array([]) if half_widths is None else half_widths[np.isfinite(half_widths)]
    return float(max(np.median(some) if len(some) else 0.0 for some in (rough, by_chance)))


def exploration_ends(changes: Array, noise: float) -> Array:
    """The last exploring layer of each row of `[draws, layers]`; 0: there is none."""
    positive = np.maximum(changes, 0)
    above = positive.sum(axis=1)[:, None] - positive.cumsum(axis=1)
    costs, levels = [positive.sum(axis=1)], [np.full(len(changes), np.inf)]
    for end in range(1, changes.shape[1] + 1):
        level = np.median(positive[:, :end], axis=1)
        costs.append(np.abs(positive[:, :end] - level[:, None]).sum(axis=1) + above[:, end - 1])
        levels.append(level)
    ends = np.argmin(costs, axis=0)
    level = np.take_along_axis(np.array(levels), ends[None], 0)[0]
    return np.where((level > noise) & (ends > 1), ends, 0)


def _convergence(changes: Array, start: int, noise: float) -> tuple[int, int]:
    """The layers `[first, last)`, from 0 and `start` on, that lower entropy; empty: none do."""
    negative = np.maximum(-changes, 0)
    best, found = float(negative[start:].sum()), (len(changes), len(changes))
    for first in range(start, len(changes)):
        for last in range(first + 1, len(changes) + 1):
            inside = negative[first:last]
            outside = negative[start:].sum() - inside.sum()
            level = np.median(inside)
            cost = float(np.abs(inside - level).sum() + outside)
            if cost < best and level > noise:
                best, found = cost, (first, last)
    return found


def advise(moments: Moments, *, confidence: float) -> tuple[Stages, Recommendation | None]:
    """The stages of a model that was read like this, and the layer to train; None: it has one
    layer, and so no internal policy.
    """
    column = pooled(moments, confidence=confidence)[COLUMN]
    widths = (column.high - column.low) / 2
    stages = find_stages(column.mean, widths)
    above = np.flatnonzero(column.mean - np.nan_to_num(widths) > 0) + 1
    last = int(above[-1]) if len(above) else None
    return stages, recommend(moments.tokens, moments.mean[COLUMN], stages, last_above_zero=last)


def recommend(
    tokens: Array, means: Array, stages: Stages, *, last_above_zero: int | None, seed: int = 0
) -> Recommendation | None:
    """The layer to train, of responses of `tokens` `[responses]` whose mean dH_ffn are `means`
    `[responses, layers]`.
    """
    responses, layers = means.shape
    if layers < 2:
        return None
    explored = stages.exploration
    layer = _trained(np.array([explored.last if explored else 0]), layers)[0]
    shares: dict[int, float] = {}
    if responses > 1:
        random = np.random.default_rng(seed)
        counts = random.multinomial(responses, np.full(responses, 1 / responses), size=DRAWS)
        weights = counts * tokens
        drawn = weights @ means / weights.sum(axis=1, keepdims=True)
        found = Counter(_trained(exploration_ends(drawn, stages.noise), layers).tolist())
        shares = {int(at): count / DRAWS for at, count in found.most_common()}
    by_rule = explored is not None and explored.last < layers
    reason = _reason(explored, layers)
    return Recommendation(int(layer), by_rule, reason, shares, last_above_zero)


def _trained(ends: Array, layers: int) -> Array:
    return np.where((ends == 0) | (ends == layers), layers - 1, ends)


def _reason(explored: Stage | None, layers: int) -> str:
    deep = f"layer {layers - 1}, the last whose policy is an internal one, is what the paper trains"
    deep += " in its Llama models (27 of 28, 31 of 32)"
    if explored is None:
        return f"the FFNs of the lowest layers do not raise entropy by more than noise, and {deep}"
    if explored.last == layers:
        return f"FFNs raise entropy up to the last layer, and {deep}"
    of = f"layers 1 to {explored.last}" if explored.last > 1 else "layer 1"
    return (
        f"layer {explored.last} is the last of the exploration region: the FFNs of {of} raise "
        f"entropy, by {explored.change:.2g} nats in the median, and those above by less than half "
        "of that or not at all"
    )


def as_record(stages: Stages, recommendation: Recommendation | None) -> dict[str, Any]:
    """What `analysis.json` says of them."""
    return {
        "stages": {
            "regions": [
                {
                    "stage": stage.name,
                    "first_layer": stage.first,
                    "last_layer": stage.last,
                    COLUMN: stage.change,
                }
                for stage in stages.stages
            ],
            "noise_nats": stages.noise,
            "about_zero_nats": [stages.low, stages.high],
        },
        "recommendation": recommendation
        and {
            "target_layer": recommendation.layer,
            "rule": "end of exploration" if recommendation.by_rule else "last internal layer",
            "reason": recommendation.reason,
            "share_of_draws": {str(at): share for at, share in recommendation.shares.items()},
            "last_layer_above_zero": recommendation.last_above_zero,
        },
    }
