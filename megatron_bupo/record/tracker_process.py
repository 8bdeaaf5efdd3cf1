"""Bring a run's metrics.jsonl to a tracker: `python -m megatron_bupo.record.tracker_process NAME
RUN_DIR`, a process of its own, which `trackers.py` starts.

The file is the queue. On stdin come one line of JSON that says what the run is, then a line
whenever a step has been written; at the end of stdin the rest is sent, and it was a run that came
to its end if the last line said so. Whatever happens here, the file has all of it.

RUN_DIR/trackers/NAME.json keeps which of the tracker's runs this is and the first step that it has
not been told: a resumed run goes on there, and a step that runs again is not told again.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from megatron_bupo.durable import lines_since, replace_text
from megatron_bupo.record.metrics import FILE, numbers

FOLDER = "trackers"
FINISHED = b"finished\n"  # what the trainer says last of a run that came to its end


class Asked(NamedTuple):
    """What a tracker is to call the run, and its settings by dotted key."""

    project: str
    name: str
    settings: Mapping[str, Any]
    first_step: int  # the run goes on here; 0: it begins


class State(NamedTuple):
    """Which of the tracker's runs this is, and how far it has been told."""

    id: str
    name: str
    next_step: int = 0
    url: str | None = None


class Tracker(Protocol):
    """An open run of a tracker."""

    url: str | None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of `step`."""
        ...

    def close(self, *, finished: bool) -> None:
        """Send what is left. `finished`: the run came to its end."""
        ...


class WandbRun:
    """Weights & Biases; WANDB_MODE=offline keeps it in RUN_DIR/wandb, for `wandb sync`."""

    def __init__(self, asked: Asked, state: State, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=asked.project,
            name=asked.name,
            id=state.id,
            resume="allow",
            config=dict(asked.settings),
            allow_val_change=True,
            dir=str(run_dir),
            settings=wandb.Settings(console="off"),
        )
        self.url: str | None = self._run.url

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class TrackioRun:
    """Trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    url: str | None = None

    def __init__(self, asked: Asked, state: State, run_dir: Path) -> None:  # noqa: ARG002
        import trackio

        self._run = trackio.init(
            project=asked.project,
            name=state.name,
            resume="allow",
            config={**asked.settings},
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - it does not ask
        self._run.finish()


RUNS: dict[str, type[WandbRun] | type[TrackioRun]] = {"wandb": WandbRun, "trackio": TrackioRun}


def main(name: str, run_dir: Path, told: IO[bytes]) -> None:
    """Tell the tracker `name` of the run in `run_dir` while lines come from `told`."""
    asked = Asked(**json.loads(told.readline()))
    path = run_dir / FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    state = _state(path, asked)
    tracker: Tracker = RUNS[name](asked, state, run_dir)
    state = state._replace(url=tracker.url)
    _keep(path, state)
    end, word = 0, b""
    while True:
        end, fresh = lines_since(run_dir / FILE, end)
        for record in map(json.loads, fresh):
            if record["step"] >= state.next_step:
                tracker.log(record["step"], numbers(record))
                state = state._replace(next_step=record["step"] + 1)
                _keep(path, state)
        if not (line := told.readline()):
            break
        word = line
    tracker.close(finished=word == FINISHED)


def _state(path: Path, asked: Asked) -> State:
    """Where the run was; a run that begins is another one."""
    if asked.first_step > 0 and path.exists():
        return State(**json.loads(path.read_text(encoding="utf-8")))
    own = uuid.uuid4().hex[:10]
    # A name is all by which trackio finds a run again
    return State(own, f"{asked.name}-{own}")


def _keep(path: Path, state: State) -> None:
    replace_text(path, json.dumps(state._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.stdin.buffer)
