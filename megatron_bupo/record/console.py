"""What does a person watching the run see? A live panel in a terminal, a line per step elsewhere.

::

    step 12/300  internal layer 6 | reward 0.412  response 1830 tok | clip 0.7%  grad 0.31
        | H_6 2.14  H 0.31 nats | generate 41 s  train 18 s              (one line in a log)

Step 12 of 300 is the record with `step` 11: a person counts the steps that are done. H is the
entropy of the full policy, H_6 that of internal layer 6's; KL, if asked for, that to the reference.
What PPO's critic foresees is the part of the returns' variance that its values explained.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_bupo.record.metrics import internal_layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from rich.console import RenderableType

    from megatron_bupo.algorithm.bupo import Policy

Record = dict[str, Any]  # as in metrics.jsonl

TREND_STEPS = 32  # how far back the sparklines look
_BARS = "▁▂▃▄▅▆▇█"


class Terminal(Console):
    """A console that nobody has to read: `train | head` ends the reading, not the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """The run as it goes; a context manager. Ranks that are not to speak say `on=False`."""

    def __init__(
        self,
        steps: int,
        *,
        title: str = "",
        history: Sequence[Record] = (),
        on: bool = True,
        live: bool = True,
        console: Console | None = None,
    ) -> None:
        """`history`: records of earlier steps, on resume. `live=False`: lines in terminals too."""
        self._steps, self._title, self._records = steps, title, list(history)
        self._on = on
        self._console = console or Terminal(highlight=False)
        self._activity, self._since, self._start = "", time.monotonic(), time.monotonic()
        self._resumed_at = len(self._records)
        self._policy = ""
        panel = on and live and self._console.is_terminal
        self._live = (
            Live(get_renderable=self._panel, console=self._console, refresh_per_second=4)
            if panel
            else None
        )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
            self._console.show_cursor()  # Live hides it, and a killed run could not bring it back
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._activity = ""
        if self._live is not None:
            self._live.stop()

    def step_begins(self, policy: Policy) -> None:
        """Show which policy the step now begun trains."""
        self._policy = str(policy)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show `activity`, with the seconds it has taken so far, while the block runs."""
        before = self._activity, self._since
        self._activity, self._since = activity, time.monotonic()
        try:
            yield
        finally:
            self._activity, self._since = before

    def step_done(self, record: Record) -> None:
        """Show a finished step: the record that went to metrics.jsonl."""
        self._records.append(record)
        if self._on and self._live is None:
            self._console.print(log_line(record, self._steps), markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for the person watching; in a terminal it scrolls by above the panel."""
        if self._on:
            self._console.print(text, markup=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        """The live display; Live asks for it a few times a second."""
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column()
        rows.add_row("step", self._progress())
        rows.add_row("now", self._now())
        if self._records:
            for name, text in _rows(self._records):
                rows.add_row(name, text)
        return Panel(rows, title=self._title or None, title_align="left", border_style="dim")

    def _progress(self) -> RenderableType:
        done = len(self._records)
        here, elapsed = done - self._resumed_at, time.monotonic() - self._start
        bar = Table.grid(padding=(0, 2))
        text = f"{done}/{self._steps}"
        left = f"{_clock(elapsed)} elapsed"
        if here and done < self._steps:
            left += f", about {_clock(elapsed / here * (self._steps - done))} left"
        bar.add_row(
            ProgressBar(total=self._steps, completed=done, width=32), text, Text(left, "dim")
        )
        return bar

    def _now(self) -> Text:
        text = Text(f"{self._policy}  " if self._policy else "", "bold")
        if self._activity:
            text.append(f"{self._activity} {_seconds(time.monotonic() - self._since)}", "not bold")
        return text


def log_line(record: Mapping[str, Any], steps: int) -> str:
    """A record as one line; what the record does not have is left out."""
    groups = [
        _joined(
            record,
            ("rollout/reward_mean", "reward {:.3f}"),
            ("rollout/response_tokens_mean", "response {:.0f} tok"),
            ("rollout/truncated_fraction", "truncated {:.0%}"),
            ("rollout/cut_fraction", "cut {:.0%}"),
            ("rollout/replaced_groups", "{:.0f} groups replaced"),
            ("rollout/reward_warnings", "{:.0f} grader warnings"),
            hide_zero=(
                "rollout/truncated_fraction",
                "rollout/cut_fraction",
                "rollout/replaced_groups",
                "rollout/reward_warnings",
            ),
        ),
        _joined(
            record,
            ("update/ratio_clipped_fraction", "clip {:.1%}"),
            ("update/grad_norm", "grad {:.2g}"),
            ("update/kl_to_reference_nats", "KL {:.2g}"),
            ("update/skipped", "{:.0f} updates skipped"),
            hide_zero=("update/skipped",),
        ),
        _joined(
            record,
            ("critic/explained_variance", "critic foresees {:z.0%}"),
            ("critic/grad_norm", "grad {:.2g}"),
            ("critic/skipped", "{:.0f} updates skipped"),
            hide_zero=("critic/skipped",),
        ),
        _entropies(record),
        _joined(
            record,
            ("eval/initial_accuracy_mean", "held-out before {:.3f}"),
            ("eval/accuracy_mean", "held-out {:.3f}"),
        ),
        _times(record),
    ]
    head = f"step {record['step'] + 1}/{steps}  {record['policy']}"
    return " | ".join([head, *(group for group in groups if group)])


def sparkline(values: Sequence[float]) -> str:
    """`values` as a row of bars between their lowest and highest; a gap where not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(_BARS) - 1
    return "".join(
        _BARS[round((value - low) / span * top)] if math.isfinite(value) else " "
        for value in values
    )


def _rows(records: Sequence[Record]) -> Iterator[tuple[str, Text]]:
    """The panel's rows about the last finished step, with the trends of those before."""
    last = records[-1]

    def with_trend(key: str, shown: str) -> Text:
        trend = sparkline([r.get(key, math.nan) for r in records[-TREND_STEPS:]])
        return Text(f"{shown:<12}").append(trend, "cyan")

    for name, key, pattern in [
        ("reward", "rollout/reward_mean", "{:.3f}"),
        ("H full", "entropy/full_nats", "{:.3f} nats"),
        ("H internal", "entropy/internal_nats", "{:.3f} nats"),
        ("critic", "critic/explained_variance", "foresees {:z.0%}"),
    ]:
        if key in last:
            yield name, with_trend(key, pattern.format(last[key]))
    measured = [
        r[key]
        for r in records
        for key in ("eval/initial_accuracy_mean", "eval/accuracy_mean")
        if key in r
    ]
    if measured:
        yield "held-out", Text(" → ".join(f"{accuracy:.3f}" for accuracy in measured[-6:]))
    update = _joined(
        last,
        ("update/ratio_clipped_fraction", "clip {:.1%}"),
        ("update/grad_norm", "grad {:.2g}"),
        ("update/kl_to_reference_nats", "KL {:.2g}"),
        ("update/learning_rate", "lr {:.1e}"),
    )
    yield "update", Text(update)
    yield "time", Text(_times(last))


def _joined(
    record: Mapping[str, Any], *shown: tuple[str, str], hide_zero: Sequence[str] = ()
) -> str:
    """The named metrics that `record` has, each in its pattern."""
    return "  ".join(
        pattern.format(record[key])
        for key, pattern in shown
        if key in record and (record[key] or key not in hide_zero)
    )


def _entropies(record: Mapping[str, Any]) -> str:
    shown = _joined(
        record,
        ("entropy/internal_nats", f"H_{internal_layer(record)} {{:.2f}}"),
        ("entropy/full_nats", "H {:.2f}"),
    )
    return f"{shown} nats" if shown else ""


def _times(record: Mapping[str, Any]) -> str:
    """Where the step's seconds went; training is the passes before the update too."""
    parts = {
        "generate": ["time/generate_s"],
        "grade": ["time/grade_s"],
        "train": [
            "time/old_logprobs_s",
            "time/ref_logprobs_s",
            "time/values_s",
            "time/update_critic_s",
            "time/update_s",
        ],
        "sync": ["time/sync_s"],
        "probe": ["time/probe_s"],
        "checkpoint": ["time/checkpoint_s"],
    }
    sums = {name: sum(record.get(key, 0.0) for key in keys) for name, keys in parts.items()}
    small = 0.05 * sum(sums.values())  # what takes less of the step than this is not worth reading
    return "  ".join(f"{name} {_seconds(s)}" for name, s in sums.items() if s > small)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
