from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bupo.durable import (
    add_lines,
    drop_torn_line,
    lines_since,
    partial_path,
    replace_text,
    replacing,
    whole_lines,
)


def killed_in(work: Callable[[], object]) -> bool:
    """Has a process that did `work` been killed by itself in the middle of it?"""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", ["old", None])
def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path: Path, before: str | None):
    path = tmp_path / "results.json"
    if before is not None:
        path.write_text(before)

    def write() -> None:
        with replacing(path) as file:
            file.write(b"n")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_in(write)
    assert partial_path(path).read_bytes() == b"n"
    assert (path.read_text() if path.exists() else None) == before
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "results.json"
    replace_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_text() == "old"


@pytest.mark.parametrize("torn", [b"", b"{", b'{"a": "\xc3', b"\r", b"\0\0"])
def test_whoever_goes_on_does_so_behind_the_last_whole_line(tmp_path: Path, torn: bytes):
    path = tmp_path / "lines.jsonl"
    add_lines(path, ["one", "", "t\u2028wo\x0b"])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    wanted = [b"one", b"", "t\u2028wo\x0b".encode()]
    assert whole_lines(path) == wanted
    drop_torn_line(path)
    assert path.read_bytes() == whole
    add_lines(path, [])
    add_lines(path, ["three"])
    assert whole_lines(path) == [*wanted, b"three"]


@pytest.mark.parametrize("content", [b"", b"only torn"])
def test_a_file_without_a_whole_line_has_none(tmp_path: Path, content: bytes):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    drop_torn_line(path)
    assert not path.exists()
    path.write_bytes(content)
    assert whole_lines(path) == []
    drop_torn_line(path)
    assert path.read_bytes() == b""


def test_lines_outlive_the_process_that_added_them(tmp_path: Path):
    def write() -> None:
        add_lines(tmp_path / "lines", ["one", "two"])
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed_in(write)
    assert whole_lines(tmp_path / "lines") == [b"one", b"two"]


def test_a_file_that_grows_is_read_on_by_whole_lines(tmp_path: Path):
    path = tmp_path / "grows.log"
    path.write_bytes(b"one\n\ntor")
    end, lines = lines_since(path, 0)
    assert (end, lines) == (5, [b"one", b""])
    assert lines_since(path, end) == (5, [])
    path.write_bytes(b"one\n\ntorn\n")
    assert lines_since(path, end) == (10, [b"torn"])
