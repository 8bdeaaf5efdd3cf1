from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_bupo.errors import InputError
from megatron_bupo.launch.local import RankFailed, Terminated, run_ranks
from tests.moments import until
from tests.runs import Running, fork


def join_group() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def on_rank_1(act: Callable[[], object]) -> Callable[[], None]:
    """A function for two ranks: rank 1 acts while rank 0 waits for it."""

    def rank() -> None:
        if join_group() == 1:
            act()
        dist.barrier()

    return rank


def raise_(error: BaseException) -> None:
    raise error


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_ranks_meet_and_end(tmp_path: Path):
    def rank(folder: Path) -> None:
        total = torch.tensor(float(join_group()))
        dist.all_reduce(total)
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
        told = " ".join(os.environ[name] for name in names)
        (folder / str(dist.get_rank())).write_text(f"{told} {total:g}")

    run_ranks(rank, 3, tmp_path)
    assert [(tmp_path / r).read_text() for r in "012"] == ["0 0 3 3 3", "1 1 3 3 3", "2 2 3 3 3"]
    assert children() == []


def test_a_single_rank_runs_here():
    seen: list[int] = []
    run_ranks(seen.append, 1, 7)
    assert seen == [7]


def test_under_torchrun_every_process_is_a_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    seen: list[int] = []
    run_ranks(seen.append, 4, 7)
    assert seen == [7]


def test_bad_input_found_by_a_rank_is_raised_as_it_is():
    error = InputError("key=3", "is bad", "be good")
    with pytest.raises(InputError) as caught:
        run_ranks(on_rank_1(lambda: raise_(error)), 2)
    assert str(caught.value) == "key=3: is bad; be good"
    assert children() == []


def test_the_rank_that_failed_is_named_though_another_waits_for_it():
    with pytest.raises(RankFailed) as caught:
        run_ranks(on_rank_1(lambda: raise_(KeyError("the reason"))), 2)
    message = str(caught.value)
    assert message.startswith("rank 1 failed:\nTraceback (most recent call last):\n")
    assert message.endswith("\nKeyError: 'the reason'")
    assert children() == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL"),
        (lambda: os._exit(3), "rank 1 exited with code 3"),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named(act: Callable[[], object], message: str):
    with pytest.raises(RankFailed) as caught:
        run_ranks(on_rank_1(act), 2)
    assert str(caught.value) == message
    assert children() == []


def test_a_rank_that_leaves_is_a_failure():
    with pytest.raises(RankFailed, match=r"(?s)^rank 1 failed:.*SystemExit: 0$"):
        run_ranks(on_rank_1(lambda: sys.exit(0)), 2)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_ends_all_ranks(
    tmp_path: Path, world: int, number: signal.Signals, error: type[BaseException]
):
    running, _ = _sleeping(tmp_path, world, error)
    os.kill(running.pid, number)
    done = running.wait()
    assert (done.code, done.err) == (9, "")


def test_ranks_die_with_a_killed_launcher(tmp_path: Path):
    running, ranks = _sleeping(tmp_path, 2, KeyboardInterrupt)
    assert {p.pid for p in running.processes()} == {running.pid, *ranks}
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL


def test_sigterm_means_after_a_run_what_it_meant_before():
    before = signal.getsignal(signal.SIGTERM)
    run_ranks(lambda: None, 1)
    assert signal.getsignal(signal.SIGTERM) is before


def _sleeping(folder: Path, world: int, error: type[BaseException]) -> tuple[Running, list[int]]:
    """Ranks that sleep under a launcher that exits with 9 at `error`, and their process ids."""

    def rank() -> None:
        (folder / f"{os.getpid()}.rank").touch()
        time.sleep(600)

    def launch() -> int:
        try:
            run_ranks(rank, world)
        except error:
            return 9
        return 0

    running = fork(launch)
    until(lambda: len([*folder.glob("*.rank")]) == world)
    return running, [int(path.stem) for path in folder.glob("*.rank")]
