"""As much of trackio as a run uses; see wandb.py."""

from __future__ import annotations

import json
import os
from pathlib import Path


def note(**what: object) -> None:
    """Add a line to the log."""
    with Path(os.environ["FAKE_TRACKER_LOG"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"tracker": __name__, **what}) + "\n")


def init(*, project: str, name: str, resume: str, config: dict[str, object], embed: bool) -> Run:
    """Begin a run, or go on with it."""
    assert resume == "allow"
    note(init=name, project=project, config=config)
    return Run()


class Run:
    def log(self, metrics: dict[str, float], *, step: int) -> None:
        note(step=step, metrics={k: v if v == v else None for k, v in metrics.items()})

    def finish(self) -> None:
        note(exit_code=None)
