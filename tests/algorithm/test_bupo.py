from __future__ import annotations

import pytest

from megatron_bupo.algorithm.bupo import (
    FULL,
    FullPolicy,
    InternalLayerPolicy,
    PhaseSchedule,
    depth_of,
)
from megatron_bupo.config.schema import BupoConfig, StageConfig


def _names(schedule: PhaseSchedule, steps: int) -> list[str]:
    return [str(schedule.policy_at(step)) for step in range(steps)]


def test_the_hard_switch_trains_the_internal_policy_for_exactly_its_steps():
    schedule = PhaseSchedule.of(BupoConfig(target_layer=6, internal_steps=3).phases())
    assert _names(schedule, 6) == ["internal layer 6"] * 3 + ["full"] * 3
    assert schedule.policy_at(10**6) == FULL == FullPolicy()
    assert [schedule.begins_at(step) for step in range(6)] == [False] * 3 + [True] + [False] * 2


def test_stages_go_bottom_up_and_end_with_the_full_policy():
    config = BupoConfig(stages=[StageConfig(2, 1), StageConfig(5, 2), StageConfig(7, 1)])
    schedule = PhaseSchedule.of(config.phases())
    layers = ["internal layer 2", "internal layer 5", "internal layer 5", "internal layer 7"]
    assert _names(schedule, 6) == [*layers, "full", "full"]
    begins = [schedule.begins_at(step) for step in range(6)]
    assert begins == [False, True, False, True, True, False]


def test_a_stage_after_one_of_the_same_layer_is_not_a_new_phase():
    schedule = PhaseSchedule.of([(2, 1), (2, 1)])
    assert [schedule.begins_at(step) for step in range(4)] == [False, False, True, False]


def test_no_internal_steps_is_the_full_policy_always():
    for config in (BupoConfig(), BupoConfig(target_layer=6), BupoConfig(internal_steps=0)):
        schedule = PhaseSchedule.of(config.phases())
        assert schedule == PhaseSchedule()
        assert all(schedule.policy_at(step) is FULL for step in range(100))
        assert not any(schedule.begins_at(step) for step in range(100))
    assert PhaseSchedule.of([(3, 0), (5, 2)]) == PhaseSchedule.of([(5, 2)])


def test_the_read_out_is_part_of_the_policy():
    raw, normed = (PhaseSchedule.of([(4, 1)], read_out_norm=norm) for norm in (False, True))
    assert raw.policy_at(0) == InternalLayerPolicy(4)
    assert normed.policy_at(0) == InternalLayerPolicy(4, read_out_norm=True)
    assert raw.policy_at(0) != normed.policy_at(0)
    assert raw.policy_at(1) == normed.policy_at(1) == FULL


def test_depth_is_what_a_policy_runs():
    assert [depth_of(policy, 36) for policy in (FULL, InternalLayerPolicy(6))] == [36, 6]


@pytest.mark.parametrize("end", range(8))
def test_a_schedule_that_is_left_trains_the_full_policy_from_there(end: int):
    schedule = PhaseSchedule.of([(2, 2), (5, 3)], resting_steps=1)
    left = schedule.until(end)
    assert _names(left, 9) == _names(schedule, end) + ["full"] * (9 - end)
    assert left.begins_at(end) == (0 < end <= 6)
    assert schedule.until(None) == schedule
