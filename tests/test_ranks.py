"""The helper under all distributed tests is itself worth a test: it must not hide a failure."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    leaf = torch.full((2,), float(dist.get_rank() + offset), requires_grad=True)
    leaf.square().sum().backward()
    assert leaf.grad is not None
    dist.all_reduce(leaf.grad)
    return dist.get_rank(), leaf.grad


def test_every_rank_runs_and_answers_in_order():
    torch.ones(3, requires_grad=True).sum().backward()  # the parent has used autograd before
    results = run_ranks(4, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    assert all(grad.tolist() == [2.0 * (10 + 11 + 12 + 13)] * 2 for _, grad in results)


def test_the_rank_that_raised_is_named_though_another_waits_for_it():
    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("the reason")
        dist.barrier()

    start = time.monotonic()  # a collective that waits for nobody gives up after 180 s
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*ValueError: the reason"):
        run_ranks(2, fail)
    assert time.monotonic() - start < 120


def test_a_rank_that_dies_is_named():
    def die() -> None:
        if dist.get_rank() == 0:
            os._exit(3)
        time.sleep(600)

    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(2, die)


@pytest.mark.slow
def test_ranks_that_hang_are_killed_with_what_they_started(tmp_path: Path):
    def hang() -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / str(dist.get_rank())).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)

    with pytest.raises(TimeoutError, match=r"\[0, 1\]"):
        run_ranks(2, hang, timeout_s=4)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    assert len(pids) == 4
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    """Is `pid` running? A killed process that nobody has waited for yet is a zombie, not alive."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
