"""How far is a piece of work? A bar in a terminal, elsewhere a line for each part.

::

    reading  1920/4096 tokens                                   (one line in a log)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_bupo.record.console import Terminal

if TYPE_CHECKING:
    from rich.progress import TaskID


class Bars:
    """Pieces of work, one after the other; a context manager. Ranks that are not to speak say
    `on=False`.
    """

    def __init__(self, *, on: bool = True, live: bool = True) -> None:
        self._on, self._console = on, Terminal(highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}  {task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._live = on and live and self._console.is_terminal
        self._bar: TaskID | None = None
        self._name, self._unit, self._total = "", "", 0

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
            self._console.show_cursor()  # a killed run could not bring it back
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bars.stop()

    def begin(self, name: str, total: int, unit: str, *, done: int) -> None:
        """`name` begins: `total` of `unit`, of which some are `done` already."""
        self._name, self._unit, self._total = name, unit, total
        if self._live:
            self._bar = self._bars.add_task(name, total=total, completed=done, unit=unit, facts="")
        elif done:
            self.say(f"{name}  {done}/{total} {unit} done before")

    def at(self, done: int, facts: str = "") -> None:
        """So much of it is done; `facts` are what else is known."""
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, facts=facts)
        else:
            self.say(f"{self._name}  {done}/{self._total} {self._unit}  {facts}".rstrip())

    def say(self, text: str) -> None:
        """A line for the person watching; in a terminal it scrolls by above the bars."""
        if self._on:
            self._console.print(text, markup=False, soft_wrap=True)
