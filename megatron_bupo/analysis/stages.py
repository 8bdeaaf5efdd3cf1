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
of their intervals). One layer alone does not explore: noise looks like that too. What fades out
would be cut at half its level, so exploration goes on over layers that raise entropy by more than
the noise and more than twice what the layers above usually change it by (the median of |dH_ffn|).

The paper trains its Llama models, whose FFNs raise entropy almost everywhere, at 27 of 28 and 31 of
32. So where exploration leaves nothing to integrate (it does not end before the last layer, or ends
in the last quarter and convergence follows), and where there is none, L - 1 is the choice: the last
layer whose policy is an internal one. How much of that hangs on the responses shows in draws of as
many, with replacement.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bupo.analysis.moments import Array, Moments, pooled

COLUMN = "ffn_entropy_change_nats"
DRAWS = 400
_NEARLY_ALL = 0.75  # of the layers
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
    [end] = exploration_ends(changes[None], noise).tolist()
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
    if 0 < end < len(changes):
        high = min(high, _usual(changes, end, noise))
    return Stages(stages, noise, -low if low else 0.0, high)


def noise_of(changes: Array, half_widths: Array | None = None) -> float:
    """What a layer's dH_ffn has to be larger than, to be a level."""
    rough = np.abs(changes[1:-1] - (changes[:-2] + changes[2:]) / 2)
    by_chance = np.array([]) if half_widths is None else half_widths[np.isfinite(half_widths)]
    return float(max(np.median(some) if len(some) else 0.0 for some in (rough, by_chance)))


def exploration_ends(changes: Array, noise: float) -> Array:
    """The last exploring layer of each row of `[draws, layers]`; 0: there is none."""
    ends = nearest_steps(changes, noise)
    for row, changed in enumerate(changes):
        end = int(ends[row])
        while 0 < end < len(changed) and changed[end] > _usual(changed, end, noise):
            end += 1
        ends[row] = end
    return ends


def nearest_steps(changes: Array, noise: float) -> Array:
    """The last layer of the level in each row of `[draws, layers]` that is nearest to what is
    positive in it, 0 above; 0: no level of two or more layers is.
    """
    positive = np.maximum(changes, 0)
    above = positive.sum(axis=1)[:, None] - positive.cumsum(axis=1)
    none = positive.sum(axis=1)
    costs = [none, np.full_like(none, np.inf)]
    for end in range(2, changes.shape[1] + 1):
        level = np.quantile(positive[:, :end], 0.5, axis=1, method="lower")
        cost = np.abs(positive[:, :end] - level[:, None]).sum(axis=1) + above[:, end - 1]
        costs.append(np.where(level > noise, cost, np.inf))
    return np.argmin(costs, axis=0)


def _usual(changes: Array, end: int, noise: float) -> float:
    """What the layer above `end` has to exceed, to belong to the exploration below it."""
    return max(noise, 2 * float(np.median(np.abs(changes[end:]))))


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
    changes = (tokens[:, None] * means).sum(axis=0) / tokens.sum()  # to the bit as `pooled` has it
    [layer] = _trained(changes[None], stages.noise).tolist()
    shares: dict[int, float] = {}
    if responses > 1:
        random = np.random.default_rng(seed)
        counts = random.multinomial(responses, np.full(responses, 1 / responses), size=DRAWS)
        weights = counts * tokens
        drawn = weights @ means / weights.sum(axis=1, keepdims=True)
        found = Counter(_trained(drawn, stages.noise).tolist())
        shares = {int(at): count / DRAWS for at, count in found.most_common()}
    explored = stages.exploration
    by_rule = explored is not None and explored.last == layer
    reason = _reason(explored, layer, layers)
    return Recommendation(layer, by_rule, reason, shares, last_above_zero)


def _trained(changes: Array, noise: float) -> Array:
    """The layer to train of each row of `[draws, layers]`."""
    layers = changes.shape[1]
    ends = exploration_ends(changes, noise)
    above = np.arange(layers) >= ends[:, None]
    lowered = (changes * above).sum(axis=1) < -noise * above.sum(axis=1)
    deep = (ends == 0) | (ends == layers) | ((ends > _NEARLY_ALL * layers) & lowered)
    return np.where(deep, layers - 1, ends)


def _reason(explored: Stage | None, layer: int, layers: int) -> str:
    deep = f"layer {layers - 1}, the last whose policy is an internal one, is what the paper trains"
    deep += " in its Llama models (27 of 28, 31 of 32)"
    if explored is None:
        return f"the FFNs of the lowest layers do not raise entropy by more than noise, and {deep}"
    if explored.last == layers:
        return f"FFNs raise entropy up to the last layer, and {deep}"
    of = f"the FFNs of layers 1 to {explored.last} raise entropy, by {explored.change:.2g} nats in"
    of += " the median, and those above"
    if explored.last != layer:
        return f"{of} lower it, so that no layer integrates, and {deep}"
    return f"layer {layer} is the last of the exploration region: {of} do not, or hardly"


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
