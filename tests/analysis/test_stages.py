"""Stages on curves in the shapes of the paper's models, and the layer that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

import numpy as np
import pytest

from megatron_bupo.analysis.moments import Moments
from megatron_bupo.analysis.stages import (
    COLUMN,
    advise,
    exploration_ends,
    find_stages,
    nearest_steps,
    recommend,
)

WAVE = 0.1 * np.sin(7.0 * np.arange(40))  # what layers differ by, and no more


def shaped(*parts: tuple[int, float, float]) -> np.ndarray:
    """`(layers, from, to)` after one another, uneven by `WAVE`."""
    curve = np.concatenate([np.linspace(start, stop, layers) for layers, start, stop in parts])
    return curve + WAVE[: len(curve)] * np.minimum(np.abs(curve) + 0.3, 1)


QWEN = shaped((6, 3.5, 2.5), (20, 0.2, -0.2), (10, -5.0, -10.0))
LLAMA = np.append(0.1 + WAVE[:27] / 4, -0.15)
DEEPSEEK = shaped((2, 0.1, -0.1), (20, -2.0, -3.0), (8, -0.2, -0.1))


def regions(changes: np.ndarray) -> list[tuple[str, int, int]]:
    return [(s.name, s.first, s.last) for s in find_stages(changes).stages]


def test_a_curve_like_qwen3_explores_integrates_and_converges():
    assert regions(QWEN) == [
        ("exploration", 1, 6),
        ("integration", 7, 26),
        ("convergence", 27, 36),
    ]


def test_a_curve_like_llama_explores_weakly_up_to_the_last_layer():
    assert regions(LLAMA) == [("exploration", 1, 27), ("convergence", 28, 28)]


def test_a_curve_like_deepseek_does_not_explore_and_converges_in_the_middle():
    assert regions(DEEPSEEK) == [("convergence", 3, 22)]


@pytest.mark.parametrize("layer", [1, 3, 15, 30])
def test_no_single_layer_turns_a_stage(layer: int):
    changes = QWEN.copy()
    changes[layer - 1] = -changes[layer - 1] if layer != 15 else 3.0
    assert regions(changes) == regions(QWEN)


def test_stages_do_not_hang_on_the_unit():
    assert regions(QWEN * 1e-3) == regions(QWEN) == regions(QWEN * 1e3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0], [("exploration", 1, 4)]),
        ([-1.0, -1.1, -0.9, -1.0], [("convergence", 1, 4)]),
        ([0.0, 0.0, 0.0, 0.0], []),
        ([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], []),
        ([2.0], []),
        ([0.0], []),
        ([2.0, -2.0], [("convergence", 2, 2)]),
    ],
    ids=["positive", "negative", "zero", "to and fro", "one layer", "one, zero", "two layers"],
)
def test_edges(changes: list[float], expected: list[tuple[str, int, int]]):
    assert regions(np.array(changes)) == expected


def test_changes_within_their_intervals_are_no_stages():
    found = find_stages(LLAMA, np.full(len(LLAMA), 0.2))
    assert (found.stages, found.noise) == ((), 0.2)
    assert find_stages(LLAMA, np.full(len(LLAMA), np.nan)) == find_stages(LLAMA)


def test_a_layer_is_about_zero_where_it_is_nearer_to_zero_than_to_the_level():
    found = find_stages(QWEN)
    assert found.low == pytest.approx(np.median(QWEN[26:]) / 2)
    assert found.high == pytest.approx(2 * np.median(np.abs(QWEN[6:])))
    rough = np.append(QWEN[:6], 1.2 * (-1.0) ** np.arange(30))
    assert find_stages(rough).high == pytest.approx(np.median(QWEN[:6]) / 2)


def test_the_level_of_the_exploration_region_is_the_nearest_of_all():
    random = np.random.default_rng(0)
    for changes in random.normal(0.2, 1, size=(50, 9)):
        positive = [max(x, 0.0) for x in changes.tolist()]
        costs = {0: sum(positive)}
        for end in range(2, 10):  # one layer alone is no region
            level = median_low(positive[:end])
            if level > 0.1:
                costs[end] = sum(abs(x - level) for x in positive[:end]) + sum(positive[end:])
        [end] = nearest_steps(changes[None], 0.1).tolist()
        assert costs[end] == pytest.approx(min(costs.values()))


@pytest.mark.parametrize(
    "exploring",
    [
        np.linspace(4.0, 0.5, 6),
        4.0 * np.exp(-np.arange(6) / 2),
        [4.0, 0.9, 0.8, 0.9, 0.7, 0.6],
        [0.8, 2.5, 3.8, 3.0, 1.6, 0.7],
    ],
    ids=["linear", "exponential", "one high", "hump"],
)
def test_exploration_that_fades_out_is_not_cut_at_half_its_level(exploring: Sequence[float]):
    changes = np.concatenate([exploring, np.linspace(0.02, -0.1, 20), np.linspace(-2, -8, 10)])
    for noise in np.random.default_rng(0).normal(0, 0.04, size=(20, 36)):
        [end] = exploration_ends(changes[None] + noise, 0.05).tolist()
        assert end == 6
    assert find_stages(changes).high < exploring[-1]


def test_what_fades_out_all_the_way_ends_where_layers_are_as_those_above():
    changes = np.linspace(4, 0, 30)[None]
    assert exploration_ends(changes, 0.01) == nearest_steps(changes, 0.01) == [19]


def moments(changes: np.ndarray, *, spread: float, responses: int = 30) -> Moments:
    """Responses of one token each, whose changes differ from `changes` by `spread`."""
    noise = np.random.default_rng(1).normal(0, spread, size=(responses, len(changes)))
    noise -= noise.mean(axis=0)
    tokens = np.ones(responses, dtype=np.int64)
    return Moments(tokens, {COLUMN: changes + noise}, {COLUMN: 0 * noise})


@pytest.mark.parametrize(
    ("changes", "layer", "by_rule"),
    [
        (QWEN, 6, True),
        (LLAMA, 27, True),
        (np.append(LLAMA[:25], [-0.1, -0.2, -0.3]), 27, False),
        (DEEPSEEK, 29, False),
        (np.full(28, 0.1), 27, False),
        (shaped((25, 1.0, 0.9), (3, 0.05, -0.05)), 25, True),
    ],
    ids=["qwen", "llama", "llama, three converge", "deepseek", "all positive", "integrates late"],
)
def test_the_layer_is_the_last_that_explores_else_the_last_internal_one(
    changes: np.ndarray, layer: int, by_rule: bool
):
    _, found = advise(moments(changes, spread=0.01), confidence=0.95)
    assert found is not None
    assert (found.layer, found.by_rule) == (layer, by_rule)
    assert found.shares[layer] == 1.0
    assert str(layer) in found.reason


def test_a_layer_that_hangs_on_the_responses_says_so():
    changes = np.array([2.0, 2.0, 2.0, 0.5, 0.25, -0.25, 0.25, -0.25])  # the fourth is either
    found = recommend(
        np.ones(30),
        moments(changes, spread=0.3).mean[COLUMN],
        find_stages(changes),
        last_above_zero=4,
    )
    assert found is not None
    assert set(found.shares) == {3, 4}
    assert 0.2 < found.shares[3] < 0.8
    assert sum(found.shares.values()) == pytest.approx(1)


def test_one_response_leaves_the_shares_open_and_one_layer_the_choice():
    _, found = advise(moments(QWEN, spread=0.0, responses=1), confidence=0.95)
    assert found is not None
    assert (found.layer, found.shares) == (6, {})
    assert advise(moments(QWEN[:1], spread=0.0), confidence=0.95)[1] is None
