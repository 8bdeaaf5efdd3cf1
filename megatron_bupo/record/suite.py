"""What does a person watching an evaluation see? A bar per benchmark in a terminal, elsewhere a
line per batch.

::

    AIME24  128/500 questions  avg 0.369  8120 tok/s          (one line in a log)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_bupo.record.console import Terminal

if TYPE_CHECKING:
    from rich.progress import TaskID


class SuiteDisplay:
    """The suite as it goes; a context manager. Ranks that are not to speak say `on=False`."""

    def __init__(self, *, on: bool = True, live: bool = True) -> None:
        self._on, self._console = on, Terminal(highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} questions  {task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._live = on and live and self._console.is_terminal
        self._bar: TaskID | None = None
        self._name, self._questions = "", 0
        self._began, self._tokens = time.monotonic(), 0

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
            self._console.show_cursor()  # a killed run could not bring it back
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bars.stop()

    def begin(self, name: str, questions: int, *, done: int) -> None:
        """The benchmark `name`, of whose `questions` some are `done` already, is asked from now."""
        self._name, self._questions = name, questions
        self._began, self._tokens = time.monotonic(), 0
        if self._live:
            self._bar = self._bars.add_task(name, total=questions, completed=done, facts="")
        elif done:
            self.say(f"{name}  {done}/{questions} questions  answered before")

    def answered(self, done: int, *, avg: float, tokens: int) -> None:
        """`done` questions are answered, with `avg` so far; `tokens` more were sampled."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        facts = f"avg {avg:.3f}  {rate:.0f} tok/s"
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, facts=facts)
        else:
            self.say(f"{self._name}  {done}/{self._questions} questions  {facts}")

    def say(self, text: str) -> None:
        """A line for the person watching; in a terminal it scrolls by above the bars."""
        if self._on:
            self._console.print(text, markup=False, soft_wrap=True)
