"""What a guard says of probes: bounds, and as many crossings in a row as its patience."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from megatron_bupo.config.schema import GuardConfig
from megatron_bupo.guard import Watch, crossings

BEFORE = {
    "probe/perplexity": 2.0,
    "probe/kl_internal_to_full_nats": 1.0,
    "probe/full_entropy_nats": 0.3,
    "probe/repetition_fraction": 0.1,
    "probe/response_tokens_mean": 100.0,
}
BOUNDS = GuardConfig(
    enabled=True,
    perplexity_ratio=1.5,
    kl_increase_nats=0.5,
    entropy_increase_nats=0.05,
    repetition_increase=0.2,
    response_tokens_ratio=2.0,
)


@pytest.mark.parametrize(
    ("metric", "within", "out"),
    [
        ("probe/perplexity", 3.0, 3.001),
        ("probe/kl_internal_to_full_nats", 1.5, 1.501),
        ("probe/full_entropy_nats", 0.349, 0.351),
        ("probe/repetition_fraction", 0.299, 0.301),
        ("probe/response_tokens_mean", 200.0, 201.0),
    ],
)
def test_a_bound_is_crossed_beyond_it_and_names_metric_values_and_key(
    metric: str, within: float, out: float
):
    assert list(crossings(BOUNDS, BEFORE, BEFORE | {metric: within})) == []
    (reason,) = crossings(BOUNDS, BEFORE, BEFORE | {metric: out})
    assert reason.startswith(f"{metric} is {out:.4g}, and was {BEFORE[metric]:.4g}")
    assert "(bupo.guard." in reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_out_of_bounds(value: float):
    for metric in BEFORE:
        assert len(list(crossings(BOUNDS, BEFORE, BEFORE | {metric: value}))) == 1
    assert len(list(crossings(BOUNDS, dict.fromkeys(BEFORE, math.nan), BEFORE))) == len(BEFORE)


def test_a_bound_that_is_null_asks_for_nothing():
    loose = GuardConfig(perplexity_ratio=None, repetition_increase=None, response_tokens_ratio=None)
    assert list(crossings(loose, {}, {})) == []


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_leaves_at_the_last_of_so_many_crossings_in_a_row(patience: int):
    guard = GuardConfig(enabled=True, perplexity_ratio=1.5, patience=patience)
    watch = Watch().begin(BEFORE)
    high = BEFORE | {"probe/perplexity": 9.0}
    seen = [BEFORE] + [high] * (patience - 1) + [BEFORE] + [high] * patience
    left = []
    for number, probe in enumerate(seen):
        watch, reasons = watch.after(5 * number, probe, guard)
        assert bool(reasons) == (probe is high)
        left.append(watch.left_before)
    assert left == [None] * (len(seen) - 1) + [5 * (len(seen) - 1)]
    assert watch.within == 5 * patience


def test_it_goes_through_a_checkpoint_to_the_bit():
    watch = Watch().begin(BEFORE | {"probe/perplexity": 1.1 + 2.2})
    watch, _ = watch.after(5, BEFORE, BOUNDS)
    assert Watch(**json.loads(json.dumps(asdict(watch)))) == watch
