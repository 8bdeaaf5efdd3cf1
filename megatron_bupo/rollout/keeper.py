"""How does a program that we start never outlive us, whoever of us is killed, and however?

Between the trainer and the program stands this file, run as a script: the keeper. It holds the read
end of a pipe that only the trainer can write to. When that closes, because the trainer asks for it
or is no more, the keeper kills the program and all that descends from it; and so it does when the
program ends by itself. The kernel sees to the rest: descendants that lose their parent become
children of the keeper (a subreaper), so none escapes into a session of its own, and a keeper that
is killed takes the program with it.

It is a process and not a death signal asked for by the program, because that signal follows the
thread that started it, does not reach grandchildren, and is not asked for by a child that is still
importing its modules when its parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_KILL_S = 10.0  # for the killed to be gone; a process inside a hung driver call is not


class Kept:
    """A running program under a keeper. Its output goes to the end of `log`, after a line with
    `title` and its process id.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, title: str
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, title, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=env,
                start_new_session=True,  # out of reach of Ctrl-C, which is ours to act on
            )
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._leash, told = self._keeper.stdin, self._keeper.stdout
        with told:
            self.pid = int(told.readline() or 0)  # 0: it could not be executed, and the log says so

    def poll(self) -> int | None:
        """None while it runs, else its exit code; 128 + n after a signal n, as a shell has it."""
        return self._keeper.poll()

    def stop(self) -> None:
        """Kill it with all its descendants, and wait until they are gone."""
        self._leash.close()
        try:
            self._keeper.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def last_words(log: Path, lines: int) -> str:
    """The end of a log, for an error message."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        text = file.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
    return ""


def _keep(title: str, command: Sequence[str]) -> int:
    """Run `command` until it ends or our standard input does; leave nothing of it behind."""
    keeper = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the next line is heeded
    signal.set_wakeup_fd(wake.fileno())

    def begin() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it was faster
            os._exit(1)
        os.write(2, f"=== {title}, pid {os.getpid()}\n".encode())

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
        preexec_fn=begin,  # noqa: PLW1509 - we are but one thread
    ).pid
    os.write(1, b"%d\n" % child)
    # A child that has ended stays a zombie until `_end`, so that nobody else gets its process id
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        ready, _, _ = select.select([0, ours], [], [])
        if ours in ready:
            ours.recv(4096)
        if 0 in ready and not os.read(0, 1):
            break
    return _end(child)


def _end(child: int) -> int:
    """Kill all descendants; the exit code of `child`."""
    code = 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # raised when none is left
        while True:
            for pid in _children():  # those of the dead are ours now
                os.kill(pid, signal.SIGKILL)
            pid, status = os.waitpid(-1, 0)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _children() -> list[int]:
    """Our children, zombies among them; none where the kernel does not say."""
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
        return [int(pid) for pid in listed.split()]
    return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1], sys.argv[2:]))
