from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Prompt, Rollout, RolloutGroup

FUNCTIONS = """
import os, time
kept = []

def act(response, answer):
    if response == "take 300": return len(bytearray(300 << 20)) > 0
    if response == "grow":
        out = []
        while True: out.append("x" * 10000)
    if response == "keep 40": kept.append(bytearray(40 << 20))
    if response == "pid": return os.getpid()
    if response == "wait": time.sleep(0.4)
    return 1.0
"""


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return f"{tmp_path}/functions.py:act"


def group(*responses: str, index: int = 0) -> RolloutGroup:
    prompt = Prompt(index, (1,), "7", "?", {})
    return RolloutGroup(
        prompt, tuple(Rollout(prompt, (5,), r, (), (), "stop", 0) for r in responses)
    )


def test_a_function_that_takes_too_much_memory_costs_its_own_rollout(function: str) -> None:
    grader = Grader(RewardConfig(function, memory_mb=200))
    [grades] = grader.grade([group("7", "take 300", "grow", "7")])
    grader.close()
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 1.0]
    told = [grade.warning for grade in grades[1:3]]
    assert told == ["reward function needed more memory than 200 MB"] * 2


def test_without_a_limit_memory_may_be_taken(function: str) -> None:
    grader = Grader(RewardConfig(function, memory_mb=None))
    [[grade]] = grader.grade([group("take 300")])
    grader.close()
    assert (grade.reward, grade.warning) == (1.0, None)


def test_what_a_function_keeps_is_given_back_before_it_costs_anybody_a_reward(
    function: str,
) -> None:
    grader = Grader(RewardConfig(function, memory_mb=200))
    [grades] = grader.grade([group("pid", *["keep 40"] * 12, "pid")])
    grader.close()
    assert {grade.warning for grade in grades} == {None}
    assert [grade.reward for grade in grades[1:-1]] == [1.0] * 12
    assert grades[0].reward != grades[-1].reward  # another process


@pytest.mark.slow
def test_a_long_batch_gets_more_processes_and_keeps_its_order(function: str) -> None:
    grader = Grader(RewardConfig(function, processes=4))
    groups = [group("wait", "pid", index=i) for i in range(16)]
    pids = {grades[1].reward for grades in grader.grade(groups)}
    assert len(pids) > 1
    again = grader.grade([group("7", index=i) for i in range(9)] + [group("pid", "7", index=9)])
    grader.close()
    assert [len(grades) for grades in again] == [1] * 9 + [2]
    assert [g.reward for grades in again for g in grades][:9] == [1.0] * 9
    assert again[-1][0].reward in pids
