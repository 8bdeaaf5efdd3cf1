from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.launch.lock import hold
from tests.moments import until
from tests.runs import fork


def hold_until_killed(run_dir: Path, *, with_a_rank: bool = False) -> int:
    """Hold `run_dir`; a child that shares the lock, as ranks do, lives on a little from `go` on."""
    with hold(run_dir):
        if with_a_rank and os.fork() == 0:
            (run_dir / "child").touch()
            until((run_dir / "go").exists)
            time.sleep(0.3)
            os._exit(0)
        (run_dir / "held").touch()
        time.sleep(600)
    return 0


def test_a_directory_is_made_and_held_for_the_block(tmp_path: Path):
    run_dir = tmp_path / "runs" / "one"
    with hold(run_dir), pytest.raises(InputError) as error, hold(run_dir, patience_s=0):
        pass
    assert str(error.value) == (
        f"run_dir={run_dir}: another run is writing to it (process {os.getpid()}); "
        "wait for it, end it, or choose another run_dir"
    )
    with hold(run_dir, patience_s=0):
        pass


@pytest.mark.slow
def test_a_killed_run_is_waited_for_until_its_last_rank_is_gone(tmp_path: Path):
    killed = fork(lambda: hold_until_killed(tmp_path, with_a_rank=True))
    until((tmp_path / "held").exists)
    until((tmp_path / "child").exists)
    os.kill(killed.pid, 9)
    with (
        pytest.raises(InputError, match=rf"\(process {killed.pid}\)"),
        hold(tmp_path, patience_s=0),
    ):
        pass
    (tmp_path / "go").touch()
    with hold(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    killed.wait()


def test_no_killed_run_blocks_the_next(tmp_path: Path):
    killed = fork(lambda: hold_until_killed(tmp_path))
    until((tmp_path / "held").exists)
    killed.kill()
    with hold(tmp_path, patience_s=0):
        pass


def test_a_program_that_a_run_started_does_not_hold_its_directory(tmp_path: Path):
    with hold(tmp_path):
        started = subprocess.Popen(["sleep", "60"])
    try:
        with hold(tmp_path, patience_s=0):
            pass
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_run_dir_that_cannot_be_made_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    run_dir = tmp_path / name
    with pytest.raises(InputError) as error, hold(run_dir):
        pass
    assert str(error.value).startswith(f"run_dir={run_dir}: cannot be written to (")
    assert str(error.value).endswith("; choose another run_dir")


def test_a_file_system_without_locks_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold(tmp_path, patience_s=0):
        pass
