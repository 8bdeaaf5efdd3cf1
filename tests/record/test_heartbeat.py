from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bupo import progress
from megatron_bupo.record.heartbeat import Heartbeat, state_file
from megatron_bupo.record.stall import RankState
from tests.moments import until
from tests.ranks import run_ranks
from tests.runs import Bed, run

pytestmark = pytest.mark.slow

STALL_S = 2.0  # half of it without a sign of life is silence, and machines are busy
ON_AGAIN = "ranks get on again"

THOUGHTFUL = """
import time

def reward(response, answer):
    if not hasattr(reward, "woken"):
        time.sleep(2.5)
        reward.woken = True
    return float(len(response))
"""


def heartbeat(run_dir: Path, stall_s: float = STALL_S) -> Heartbeat:
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Heartbeat(run_dir, rank=rank, world=world, stall_s=stall_s)


def told(run_dir: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "stall.txt").read_text()
    return ""


def written_by(rank: int, run_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(state_file(run_dir, rank).read_text())
    return {}


def without_dates(text: str) -> list[str]:
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S+ ", "", line) for line in text.splitlines()]


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def ponder(run_dir: Path) -> None:
    until(lambda: told(run_dir))


def test_a_rank_that_hangs_is_named_while_the_others_wait_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def rank() -> int:
        dist.barrier()
        with heartbeat(tmp_path):
            progress.enter("grade", 12)
            if dist.get_rank() == 1:
                ponder(tmp_path)
            progress.enter("update", 12)
            dist.all_reduce(torch.ones(1))
            progress.enter("sync", 12)
            until(lambda: ON_AGAIN in told(tmp_path))
        return os.getpid()

    pid = run_ranks(3, rank)[1]
    lines = without_dates(told(tmp_path))
    assert re.fullmatch(r"no rank has got on for \d+ s \(logging.stall_s=2\):", lines[0])
    assert re.fullmatch(r"  ranks 0, 2: update of step 13 for \d+ s, all_reduce \(.*", lines[1])
    assert re.fullmatch(r"  rank 1: grade of step 13 for \d+ s, .*", lines[2])
    who = f"rank 1 (waits for nobody, and others wait): process {pid} on {socket.gethostname()}"
    assert lines[3] == f"likely culprit: {who}"
    assert re.fullmatch(rf"{ON_AGAIN} after \d+ s", lines[-1])
    assert capfd.readouterr().err == told(tmp_path)
    stacks = [state_file(tmp_path, rank).with_suffix(".stack.txt").read_text() for rank in range(3)]
    assert [("in all_reduce\n" in text, "in ponder\n" in text) for text in stacks] == [
        (True, False), (False, True), (True, False)
    ]  # fmt: skip
    assert all(text.startswith("thread MainThread, most recent call last:\n") for text in stacks)
    assert left_in(tmp_path) == [*(f"ranks/rank-0000{r}.stack.txt" for r in range(3)), "stall.txt"]


def test_a_stopped_rank_0_is_named_by_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def rank() -> int:
        dist.barrier()
        with heartbeat(tmp_path):
            progress.enter("generate", 0)
            dist.barrier()
            if dist.get_rank() == 0:
                until(lambda: written_by(0, tmp_path).get("phase") == "generate")
                os.kill(os.getpid(), signal.SIGSTOP)
            elif dist.get_rank() == 1:
                until(lambda: told(tmp_path))
                os.kill(written_by(0, tmp_path)["pid"], signal.SIGCONT)
            dist.barrier()
        return os.getpid()

    pid = run_ranks(3, rank)[0]
    lines = without_dates(told(tmp_path))
    assert re.fullmatch(
        r"  rank 0: no sign of life for \d+ s, last in generate of step 1", lines[3]
    )
    assert f"rank 0 (no sign of life): process {pid} on {socket.gethostname()}" in lines[4]
    assert capfd.readouterr().err.count("no rank has got on") == 1
    assert not state_file(tmp_path, 0).with_suffix(".stack.txt").exists()


def test_a_rank_that_has_not_begun_is_named(tmp_path: Path):
    with Heartbeat(tmp_path, rank=1, world=2, stall_s=STALL_S):
        until(lambda: told(tmp_path))
    assert re.search(r"  rank 0: no sign of life for \d+ s, it has not begun\n", told(tmp_path))
    assert "\nlikely culprit: rank 0 (no sign of life)\n" in told(tmp_path)


def test_who_gets_on_inside_a_long_phase_says_so_by_beats(tmp_path: Path):
    with heartbeat(tmp_path, stall_s=1.5):
        progress.enter("generate", 0)
        while written_by(0, tmp_path).get("phase_s", 0) < 2.5:
            progress.beat()
            time.sleep(0.01)
    assert told(tmp_path) == ""


def test_nobody_reports_while_another_rank_gets_on(tmp_path: Path):
    def write_for_rank_1(idle_s: float) -> None:
        state = RankState(1, "node2", 7, "generate", 0, 3, 20.0, idle_s)
        state_file(tmp_path, 1).write_text(json.dumps(asdict(state)))
        os.utime(state_file(tmp_path, 1), (time.time() + 3600,) * 2)  # never silent

    with Heartbeat(tmp_path, rank=0, world=2, stall_s=0.2):
        write_for_rank_1(idle_s=0.1)
        until(lambda: written_by(0, tmp_path).get("idle_s", 0) > 0.7)
        assert told(tmp_path) == ""
        write_for_rank_1(idle_s=0.3)
        until(lambda: told(tmp_path))
    assert "\n  rank 1: generate of step 1 for 20 s\n" in told(tmp_path)


def test_what_a_killed_run_wrote_is_gone_and_what_a_failed_one_wrote_says_why(tmp_path: Path):
    state_file(tmp_path, 7).parent.mkdir()
    state_file(tmp_path, 7).write_text("{}")

    def fail() -> None:
        with heartbeat(tmp_path, stall_s=600):
            assert left_in(tmp_path) == []
            progress.enter("update", 4)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail()
    state = written_by(0, tmp_path)
    assert (state["phase"], state["step"], state["failure"]) == ("update", 4, "KeyError: 'lost'")


def test_no_thread_and_no_signal_handler_stay(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    threads = threading.enumerate()
    with heartbeat(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert "in test_no_thread_and_no_signal_handler_stay" in capfd.readouterr().err
    assert threading.enumerate() == threads
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert left_in(tmp_path) == [] == [*tmp_path.iterdir()]


def test_a_run_leaves_nothing_of_it(finished: Path):
    assert not {"ranks", "stall.txt"} & {path.name for path in finished.iterdir()}


def test_a_run_that_hangs_in_its_grader_says_so_and_goes_on(bed: Bed, tmp_path: Path):
    (tmp_path / "thoughtful.py").write_text(THOUGHTFUL)
    reward = [f"reward.function={tmp_path / 'thoughtful.py'}:reward", "reward.timeout_s=9"]
    settings = bed.settings(tmp_path / "run", *reward, "steps=1", "evaluation.every=0")
    done = run("train", *settings, "logging.stall_s=1", "checkpoint.export_hf=false")
    assert done.code == 0, done.err
    assert re.search(
        r"\n  ranks 0-1: grade of step 1 for \d+ s, .*< \w+ \(process.py:\d+\)", done.err
    )
    assert ON_AGAIN in done.err
