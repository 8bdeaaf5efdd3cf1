"""Stages on curves in the shapes of the paper's models, and the layer that they lead to."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bupo.analysis.moments import Moments
from megatron_bupo.analysis.stages import (
    COLUMN,
    advise,
    exploration_ends,
    find_stages,
    recommend,
)

WAVE = 0.1 * np.sin(7.0 * np.arange(40))  # what layers differ by, and no more


def shaped(*parts: tuple[int, float, float]) -> np.ndarray:
    """`(layers, from, to)` after one another, uneven by `WAVE`."""
    curve = np.concatenate([np.linspace(start, stop, layers) for layers, start, stop in parts])
    return curve + WAVE[: len(curve)] * np.minimum(np.abs(curve) + 0.3, 1)


QWEN = shaped((6, 3.5, 2.5), (20, 0.2, -0.2), (10, -5.0, -10.0))
LLAMA = np.append(0.1 + WAVE[:27] / 4, -0.15)
DEEPSEEK = shaped((2, 0.1, 0.0), (20, -2.0, -3.0), (8, -0.2, -0.1))


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
    assert found.high == pytest.approx(np.median(QWEN[:6]) / 2)
    assert found.low == pytest.approx(np.median(QWEN[26:]) / 2)


def test_the_exploration_region_is_the_nearest_of_all_steps():
    random = np.random.default_rng(0)
    for changes in random.normal(0.2, 1, size=(50, 9)):
        positive = [max(x, 0.0) for x in changes.tolist()]
        costs = [sum(positive)]
        for end in range(1, 10):
            level = float(np.median(positive[:end]))
            costs.append(sum(abs(x - level) for x in positive[:end]) + sum(positive[end:]))
        end = int(exploration_ends(changes[None], -1.0)[0])
        near = [costs[end]] if end else costs[:2]  # one layer alone is no region
        assert min(near) == pytest.approx(min(costs))


def moments(changes: np.ndarray, *, spread: float, responses: int = 30) -> Moments:
    """Responses of one token each, whose changes differ from `changes` by `spread`."""
    noise = np.random.default_rng(1).normal(0, spread, size=(responses, len(changes)))
    noise -= noise.mean(axis=0)
    tokens = np.ones(responses, dtype=np.int64)
    return Moments(tokens, {COLUMN: changes + noise}, {COLUMN: 0 * noise})


@pytest.mark.parametrize(
    ("changes", "layer", "by_rule"),
    [(QWEN, 6, True), (LLAMA, 27, True), (DEEPSEEK, 29, False), (np.full(28, 0.1), 27, False)],
    ids=["qwen", "llama", "deepseek", "all positive"],
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
    changes = np.array([2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # the fourth is either
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
