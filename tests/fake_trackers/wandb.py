"""As much of wandb as a run uses, which writes down what it is told and can fail on request.

FAKE_TRACKER_LOG names a JSONL file; FAKE_TRACKER says how to fail: `refuse` (at init, as without a
login), `break:STEP` (at the log of a step), `hang` (at init, for good).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace


def note(**what: object) -> None:
    """Add a line to the log."""
    with Path(os.environ["FAKE_TRACKER_LOG"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"tracker": __name__, **what}) + "\n")


def fail(where: str) -> None:
    """Fail as FAKE_TRACKER asks."""
    how = os.environ.get("FAKE_TRACKER", "")
    if how == "hang" and where == "init":
        time.sleep(600)
    if how == where or (how == "refuse" and where == "init"):
        raise RuntimeError("No API key configured.")


def Settings(*, console: str) -> SimpleNamespace:
    """What `init` takes as its settings."""
    return SimpleNamespace(console=console)


def init(
    *,
    project: str,
    name: str,
    id: str,  # noqa: A002 - wandb calls it so
    resume: str,
    config: dict[str, object],
    allow_val_change: bool,
    dir: str,  # noqa: A002
    settings: SimpleNamespace,
) -> Run:
    """Begin a run, or go on with it."""
    fail("init")
    note(init=id, project=project, name=name, config=config)
    return Run()


class Run:
    url = "https://wandb.test/run"

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        fail(f"break:{step}")
        note(step=step, metrics={k: v if v == v else None for k, v in metrics.items()})

    def finish(self, *, exit_code: int) -> None:
        note(exit_code=exit_code)
