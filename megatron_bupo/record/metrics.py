"""What happened at every step: `metrics.jsonl`, one JSON object per step, each step once.

::

    {"step": 0, "policy": "internal layer 5", "rollout/reward_mean": 0.2578125, ...}
    {"step": 1, "policy": "internal layer 5", "rollout/reward_mean": 0.28125, ...}

`step` counts from 0 and `policy` is the one that the step trained; every other key is
`area/what_unit` with a number in full precision (null where it was not finite: JSON has no NaN).
A line is on disk before the next step begins, and a run that resumes at step k first drops what a
killed run wrote of step k and later, so the file is always that of one uninterrupted run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.durable import add_lines, replacing, whole_lines

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from megatron_bupo.algorithm.bupo import Policy

FILE = "metrics.jsonl"
INTERNAL = "internal layer "  # how an internal layer policy's name begins


class MetricsLog:
    """The run's metrics, open for writing from `first_step` on; a context manager."""

    def __init__(self, run_dir: str | Path, *, first_step: int, tensorboard: bool = True) -> None:
        """Keep the steps before `first_step` and drop the others, in one atomic replacement."""
        self._path = path = Path(run_dir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in whole_lines(path) if json.loads(line)["step"] < first_step]
        with replacing(path) as file:
            file.writelines(line + b"\n" for line in kept)
        self._board = None
        self._shown_policy = ""
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides the later steps of a killed run, as above.
            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, step: int, policy: Policy, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Add the line of `step`, on disk when this returns; returns the record as written."""
        record = {"step": step, "policy": str(policy)} | {k: float(v) for k, v in metrics.items()}
        line = {k: None if _not_finite(v) else v for k, v in record.items()}
        add_lines(self._path, [json.dumps(line, allow_nan=False)])
        if self._board is not None:
            self._show(step, record)
        return record

    def close(self) -> None:
        """Close what shows them."""
        if self._board is not None:
            self._board.close()

    def _show(self, step: int, record: dict[str, Any]) -> None:
        assert self._board is not None
        for key, value in numbers(record).items():
            self._board.add_scalar(key, value, step)
        if record["policy"] != self._shown_policy:
            self._board.add_text("policy", record["policy"], step)
            self._shown_policy = record["policy"]
        self._board.flush()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, in order of step; what was not finite reads as NaN."""
    records = [json.loads(line) for line in whole_lines(Path(run_dir) / FILE)]
    return [{k: math.nan if v is None else v for k, v in record.items()} for record in records]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are told of a step: its metrics, and the layer whose policy it trained (0: the
    full policy).
    """
    known = {k: math.nan if v is None else v for k, v in record.items() if "/" in k}
    return {**known, "policy/internal_layer": float(internal_layer(record) or 0)}


def internal_layer(record: Mapping[str, Any]) -> int | None:
    """The layer (from 1) whose policy the record's step trained; None: the full policy."""
    policy = record["policy"]
    return int(policy.removeprefix(INTERNAL)) if policy.startswith(INTERNAL) else None


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
