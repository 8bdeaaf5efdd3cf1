"""The errors a user is meant to see. Bad input: key or file, value, reason, way out; one line,
exit code 2.
"""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, found before any process group starts. `str(error)` is the whole message, on
    one line.
    """

    def __init__(self, where: str, reason: str, way_out: str = "") -> None:
        """`where` names the key or file with its value, e.g. `bupo.target_layer=36`."""
        super().__init__(where, reason, way_out)  # as they are: ranks send it to their launcher

    def __str__(self) -> str:
        where, reason, way_out = self.args
        tail = f"; {way_out}" if way_out else ""
        return f"{where}: {reason}{tail}".replace("\n", " ")


class RunStopped(RuntimeError):
    """A run that cannot go on through no fault of its settings, e.g. because all servers are gone.
    What it has learned is saved; one line, exit code 1.
    """


class Preempted(RunStopped):
    """A run that was asked to stop, and has saved what it learned; the same command goes on. Exit
    code `TRY_AGAIN`.
    """


BAD_INPUT = 2
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: who started this may start it again
