from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest

from megatron_bupo.record.report.curves import (
    INTERNAL_NATS,
    Shown,
    curve,
    grouped,
    running_total,
    smoothed,
)
from megatron_bupo.record.report.runs import RunRecord
from tests.record.runs import records

REWARD = "rollout/reward_mean"
T_OF_TWO = 4.302653  # 97.5 % of Student's distribution with two degrees of freedom, of the tables


def run(name: str, *phases: tuple[str, int], every: int = 0, lift: float = 0.0, **settings):
    made = records(*phases, evaluate_every=every)
    for record in made:
        record[REWARD] += lift * (1 + record["step"])
    return RunRecord(name, Path(name), tuple(made), settings or None)


def test_an_evaluation_stands_behind_its_step_and_what_came_before_training_at_0():
    found = curve(Shown("", (run("a", ("full", 6), every=3),)), "eval/accuracy_mean")
    assert found.at == [0, 3, 6]
    assert found.values == pytest.approx([0.25, 0.28, 0.31])


def test_over_seeds_a_point_is_the_mean_with_students_interval_where_all_have_it():
    runs = [run(str(s), ("full", 5 + s), lift=0.1 * s**2, seed=s) for s in range(3)]
    (group,) = grouped(runs)
    found = curve(group, REWARD)
    assert found.at == [0, 1, 2, 3, 4]
    assert found.halves is not None
    for step, mean, half in zip(found.at, found.values, found.halves, strict=True):
        values = [0.2 + 0.01 * step + 0.1 * s**2 * (1 + step) for s in range(3)]
        assert mean == pytest.approx(fmean(values))
        assert half == pytest.approx(T_OF_TWO * stdev(values) / math.sqrt(3), rel=1e-5)


def test_smoothing_comes_before_the_interval():
    group = Shown("", tuple(run(str(s), ("full", 48), lift=0.1 * s) for s in range(3)))
    found = smoothed(group, REWARD)
    last = [fmean(0.2 + 0.01 * k + 0.1 * s * (1 + k) for k in range(44, 48)) for s in range(3)]
    assert found.values[-1] == pytest.approx(fmean(last))
    assert found.halves is not None
    assert found.halves[-1] == pytest.approx(T_OF_TWO * stdev(last) / math.sqrt(3), rel=1e-5)


def test_runs_are_grouped_by_what_they_are_set_to_but_for_seed_and_name():
    runs = [
        run("bupo-0", ("full", 1), seed=0, run_dir="runs/a", steps=3),
        run("grpo-0", ("full", 1), seed=0, run_dir="runs/b", steps=4),
        run("bupo-1", ("full", 1), seed=1, run_dir="runs/c", steps=3),
        run("unknown-0", ("full", 1)),
        run("unknown-1", ("full", 1)),
    ]
    groups = grouped(runs)
    assert [group.name for group in groups] == ["bupo, 2 seeds", "grpo-0", "unknown-0", "unknown-1"]
    assert [one.name for one in groups[0].runs] == ["bupo-0", "bupo-1"]


def test_a_line_breaks_between_phases_and_where_a_metric_was_not_there():
    shown = Shown("", (run("a", ("internal layer 2", 3), ("internal layer 4", 3), ("full", 4)),))
    found = curve(shown, INTERNAL_NATS)
    assert [x for x, y in zip(found.at, found.values, strict=True) if math.isnan(y)] == [2.5]
    record = shown.records[7]
    del record[REWARD]
    found = curve(shown, REWARD)
    assert [x for x, y in zip(found.at, found.values, strict=True) if math.isnan(y)] == [7]


def test_a_total_is_what_came_before_each_policy_and_unknown_where_a_step_lacks_it():
    shown = Shown("", (run("a", ("full", 3)),))
    total = running_total(shown, "time/step_s")
    assert total is not None
    assert dict(zip(total.at, total.values, strict=True)) == {0: 0, 1: 60, 2: 120, 3: 180}
    del shown.records[1]["time/step_s"]
    assert running_total(shown, "time/step_s") is None
