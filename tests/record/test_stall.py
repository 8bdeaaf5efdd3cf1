from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bupo.record.stall import RankState, culprits, report

WAITS = "all_reduce (distributed_c10d.py:3180) < sum_over_tokens (parallel.py:94)"
WORKS = "poll (selectors.py:415) < grade (grader.py:107)"


def waiting(rank: int, number: int = 40) -> RankState:
    """A rank that waits for others in update of step 12."""
    return RankState(
        rank, "node3", 4000 + rank, "update", 12, number, 612.2, 610.0, WAITS, waits=True
    )


def working(rank: int, number: int = 40) -> RankState:
    return replace(waiting(rank, number), at=WORKS, waits=False)


def test_a_report_says_who_stands_where_who_is_to_blame_and_what_to_do(tmp_path: Path):
    behind = replace(working(4, 38), phase="grade", phase_s=640.0)
    dead = replace(waiting(7, 38), host="node8", phase="grade", silent_s=655.4)
    failed = replace(waiting(8, 2), phase="load", step=None, silent_s=9.0, failure="OSError: no")
    unborn = RankState(9, "", 0, "", None, -1, 0.0, 0.0, silent_s=700.0)
    states = [waiting(0), waiting(1), waiting(2), waiting(3), waiting(6), behind, dead, failed]
    assert report([*states, unborn], run_dir=tmp_path, stall_s=600).splitlines() == [
        "no rank has got on for 610 s (logging.stall_s=600):",
        f"  ranks 0-3, 6: update of step 13 for 612 s, {WAITS}",
        f"  rank 4: grade of step 13 for 640 s, {WORKS}",
        "  rank 7: no sign of life for 655 s, last in grade of step 13",
        "  rank 8: no sign of life for 9 s, last in load, where it failed with OSError: no",
        "  rank 9: no sign of life for 700 s, it has not begun",
        "likely culprit: ranks 7-9 (no sign of life): process 4007 on node8, process 4008 on node3",
        "silent ranks: look for a lost node, a kill (dmesg), a stopped process (ps)",
        f"stacks: {tmp_path}/ranks/rank-*.stack.txt; kill -USR1 PID prints those of the moment",
        "1800 s after they began the collectives give up, which ends the job",
        "if this is a long phase and no stall, raise logging.stall_s",
    ]


@pytest.mark.parametrize(
    ("states", "ranks", "reason"),
    [
        ([waiting(0), working(1), waiting(2, 39)], [1], "waits for nobody, and others wait"),
        ([waiting(0), working(1), working(2, 38)], [2], "waits for nobody, and others wait"),
        ([waiting(0), waiting(1, 38)], [1], "behind the others"),
        ([working(0), working(1, 38)], [1], "behind the others"),  # as GPUs' waits look
        ([replace(working(0, 38), silent_s=9), working(1, 38)], [0], "no sign of life"),
        ([waiting(0), waiting(1)], [], None),
        ([working(0)], [], None),
    ],
)
def test_the_culprit_is_silent_or_waits_for_nobody_or_is_behind(
    states: list[RankState], ranks: list[int], reason: str | None
):
    blamed, why = culprits(states)
    assert [state.rank for state in blamed] == ranks
    assert reason is None or why == reason


def test_where_all_stand_alike_their_stacks_must_tell(tmp_path: Path):
    text = report([waiting(0), waiting(1)], run_dir=tmp_path, stall_s=600)
    assert (
        "\nlikely culprit: cannot be told, for all stand in one phase; see their stacks\n" in text
    )
