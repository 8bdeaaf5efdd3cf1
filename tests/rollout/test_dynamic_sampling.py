from __future__ import annotations

import random

import pytest

from megatron_bupo.rollout.dynamic_sampling import Graded, has_signal, place_of, with_signal
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup

DULL, TELLING = (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def graded(rows: list[tuple[int, tuple[float, ...]]]) -> Graded:
    """Groups of one rollout, whose tokens their prompt's index counts; with rewards."""
    prompts = [Prompt(index, (), "", "") for index, _ in rows]
    return Graded(
        [RolloutGroup(p, (Rollout(p, (1,) * p.index, "", (), None, "stop", 0),)) for p in prompts],
        [[Grade(reward) for reward in rewards] for _, rewards in rows],
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_places_without_a_signal_are_filled_in_order_for_so_many_rounds(rounds: int, seed: int):
    rng = random.Random(seed)
    first = [(i, rng.choice((DULL, TELLING))) for i in range(6)]
    pool = [[(100 * n + i, rng.choice((DULL, DULL, TELLING))) for i in range(6)] for n in range(4)]
    expected, asked, used = list(first), [], 0
    for number in range(1, rounds + 1):
        dull = [place for place in range(6) if expected[place][1] == DULL]
        if dull:
            used, asked = number, [*asked, (number, len(dull))]
        found = [row for row in pool[number][: len(dull)] if row[1] == TELLING]
        for place, row in zip(dull, found, strict=False):
            expected[place] = row
    seen: list[tuple[int, int]] = []

    def ask(number: int, count: int) -> Graded:
        seen.append((number, count))
        return graded(pool[number][:count])

    kept = with_signal(graded(first), rounds=rounds, ask=ask)
    assert [group.prompt.index for group in kept.groups] == [index for index, _ in expected]
    assert [tuple(g.reward for g in grades) for grades in kept.grades] == [r for _, r in expected]
    assert seen == asked
    tokens = sum(index for index, _ in first)
    tokens += sum(index for number, count in asked for index, _ in pool[number][:count])
    if not rounds:
        assert kept.measures == {"rollout/sampled_tokens": tokens}
        return
    assert kept.measures == {
        "rollout/sampled_tokens": tokens,
        "rollout/dynamic_rounds": used,
        "rollout/further_groups": sum(count for _, count in asked),
        "rollout/replaced_groups": sum(row not in first for row in expected),
        "rollout/reward_mean": pytest.approx(sum(sum(rewards) for _, rewards in first) / 18),
        "rollout/kept_reward_mean": pytest.approx(sum(sum(r) for _, r in expected) / 18),
    }


def test_no_round_of_any_step_shares_its_place_with_another_or_with_a_step():
    rounds = 3
    places = [place_of(s, r, rounds=rounds) for s in range(50) for r in range(1, rounds + 1)]
    assert len(set(places)) == len(places)
    assert min(places) > 10**9


def test_a_group_has_a_signal_if_its_rewards_differ_at_all():
    assert not has_signal([Grade(0.5), Grade(0.5, "warned")])
    assert has_signal([Grade(0.5), Grade(0.5 + 1e-12)])
    assert not has_signal([Grade(1.0)])
