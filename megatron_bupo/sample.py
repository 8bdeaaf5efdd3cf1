"""A step's rollouts with their grades: what is asked first, and what takes the place of groups that
nothing can be learned from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo.rollout.dynamic_sampling import Graded, place_of, with_signal

if TYPE_CHECKING:
    from megatron_bupo.record.journal import Journal
    from megatron_bupo.rewards.grader import Grading
    from megatron_bupo.rollout.ahead import RolloutStream


def sample(
    step: int, rollouts: RolloutStream, grader: Grading, journal: Journal, *, rounds: int
) -> Graded:
    """The groups of `step`; in at most `rounds` rounds those without a signal are replaced.
    Collective.
    """

    def graded(number: int, count: int) -> Graded:
        with journal.doing("generate"):
            place = place_of(step, number, rounds=rounds)
            groups = rollouts.further(place, count) if number else rollouts.at(step)
        with journal.doing("grade"):
            return Graded(groups, grader.grade(groups))

    return with_signal(graded(0, 0), rounds=rounds, ask=graded)
