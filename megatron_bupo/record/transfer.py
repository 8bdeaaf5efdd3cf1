"""How far is a copy of known size? A bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_bupo.record.console import Terminal

LINE_EVERY_S = 10.0


class Transfer:
    """`total` bytes on their way, of which `done` had arrived before; a context manager."""

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._console = Terminal(highlight=False)
        self._before, self._begin = done, time.monotonic()
        self._last_line = self._begin
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        if self.done:
            self.say(f"going on after {in_bytes(self.done)} of {in_bytes(self.total)}")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, bytes_: int, doing: str) -> None:
        """So many more have arrived, while `doing`."""
        self.done += bytes_
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, advance=bytes_, description=f"{self.title}: {doing}")
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            rate = in_bytes(int((self.done - self._before) / (now - self._begin)))
            self.say(f"{doing}: {in_bytes(self.done)} of {in_bytes(self.total)}, {rate}/s")

    def say(self, text: str) -> None:
        """One line for the person watching."""
        self._console.print(text, markup=False, soft_wrap=True)

    def summary(self) -> str:
        """Seconds, rate and the most memory that this process has had."""
        seconds = max(time.monotonic() - self._begin, 1e-3)
        rate = in_bytes(int((self.done - self._before) / seconds))
        return f"{seconds:.1f} s, {rate}/s, peak memory {in_bytes(peak_memory())}"


def peak_memory() -> int:
    """The most bytes that this process has had resident; `ru_maxrss` counts its parent's too."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_bytes(count: int) -> str:
    """A number of bytes in its decimal unit, as disks are sold: `3.1 GB`."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"
