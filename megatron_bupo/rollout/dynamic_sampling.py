"""What if all responses to a prompt are worth the same? Then nothing is learned from its group, and
that of another prompt takes its place (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2).

A round asks as many further prompts as there are groups without a signal; those of them that have
one take the places, in order. After the last round what is left stays as it is, so a step always
has as many groups, and its cost is bounded.

Further prompts are those of steps that no run reaches: round r of step s asks the first prompts of
step 2^32 + rounds x s + r - 1, with its seed. So they too are a pure function of seed and step, and
those of the steps themselves stay what they are. A prompt may thereby come again within an epoch.
Replacements are always drawn by the present weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_bupo.types import Grade, RolloutGroup

OUT_OF_REACH = 2**32


@dataclass(frozen=True)
class Graded:
    """Groups and the grades of their rollouts, in one order."""

    groups: Sequence[RolloutGroup]
    grades: Sequence[Sequence[Grade]]
    measures: dict[str, float] = field(default_factory=dict)


def place_of(step: int, number: int, *, rounds: int) -> int:
    """The step, out of reach, whose prompts and seed round `number` (from 1) of `step` has."""
    return OUT_OF_REACH + rounds * step + number - 1


def with_signal(asked: Graded, *, rounds: int, ask: Callable[[int, int], Graded]) -> Graded:
    """`asked` with groups that have no signal replaced, as far as `rounds` rounds find others;
    `ask(number, count)` gives `count` further groups for round `number`. `measures` says what it
    took; its mean reward is that of what was asked first, for those kept were chosen by theirs.
    """
    groups, grades = list(asked.groups), list(asked.grades)
    further, replaced, used, tokens = 0, 0, 0, _tokens(asked)
    for number in range(1, rounds + 1):
        without = [place for place, group in enumerate(grades) if not has_signal(group)]
        if not without:
            break
        found = ask(number, len(without))
        used, further, tokens = number, further + len(without), tokens + _tokens(found)
        new = [pair for pair in zip(found.groups, found.grades, strict=True) if has_signal(pair[1])]
        for place, (group, grade) in zip(without, new, strict=False):
            groups[place], grades[place] = group, grade
        replaced += len(new)
    measures = {"rollout/sampled_tokens": float(tokens)}
    if rounds:
        measures |= {
            "rollout/dynamic_rounds": float(used),
            "rollout/further_groups": float(further),
            "rollout/replaced_groups": float(replaced),
            "rollout/reward_mean": _mean_reward(asked.grades),
            "rollout/kept_reward_mean": _mean_reward(grades),
        }
    return Graded(groups, grades, measures)


def _tokens(asked: Graded) -> int:
    """Response tokens of all groups."""
    return sum(len(rollout.response_ids) for group in asked.groups for rollout in group.rollouts)


def _mean_reward(grades: Sequence[Sequence[Grade]]) -> float:
    return fmean(grade.reward for group in grades for grade in group)


def has_signal(grades: Sequence[Grade]) -> bool:
    """Do the rewards of a group differ?"""
    return len({grade.reward for grade in grades}) > 1
