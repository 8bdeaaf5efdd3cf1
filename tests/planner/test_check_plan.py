"""Plans are true of real ranks: what tools/check_plan.py measures, of two of its layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_plan import TOLERATED, check_case


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pp 2, recompute", "experts, one rank"])
def test_ranks_hold_what_was_planned(case: str, tmp_path: Path):
    rows = check_case(case, tmp_path)
    assert {row.category for row in rows} == {"weights", "gradients", "optimizer", "passes"}
    for row in rows:
        exact = row.category != "passes"  # but for the padding of Megatron's buffers
        assert abs(row.off) <= (0.01 if exact else TOLERATED), row
