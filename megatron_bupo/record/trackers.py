"""A run told to Weights & Biases or trackio, by a process beside it (`tracker_process.py`).

Trackers import for seconds, ask for passwords, print, wait for networks and start servers. None
of that may stop or slow a run, so none of it happens in it: all that the trainer does after a step
is to write one byte. A tracker that dies is told of once; metrics.jsonl goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_bupo.config import expand, flatten
from megatron_bupo.config.schema import Config
from megatron_bupo.config.tracker_rules import shareable
from megatron_bupo.record.tracker_process import FINISHED, FOLDER, Asked

PATIENCE_S = 60.0  # at the end of the run, to send what is left


class TrackerProcess:
    """The process of one tracker."""

    def __init__(self, name: str, run_dir: Path, asked: Asked) -> None:
        self.name = name
        self._state = run_dir / FOLDER / f"{name}.json"
        self._log = run_dir / FOLDER / f"{name}.log"
        self._silent = False  # it is gone, and that has been told
        self._url_told = False
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_bupo.record.tracker_process", name, run_dir],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # out of reach of Ctrl-C: it sends the rest then
            )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        self._say(f"{json.dumps(asked._asdict())}\n".encode())
        os.set_blocking(self._pipe, False)

    def step_done(self) -> list[str]:
        """A step has been written; what there is to tell the person watching."""
        if self._silent:
            return []
        if self._process.poll() is not None:
            self._silent = True
            return [f"warning: {self._gone()}"]
        self._say(b"\n")
        return self._address()

    def close(self, *, finished: bool, patience_s: float = PATIENCE_S) -> list[str]:
        """Let it send what is left, but no longer than so; what there is to tell."""
        assert self._process.stdin is not None
        if finished:
            self._say(FINISHED)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            return [f"warning: {self.name} was not done after {patience_s:g} s; see {self._log}"]
        return [f"warning: {self._gone()}"] if code and not self._silent else []

    def _say(self, words: bytes) -> None:
        # Full: it is behind, and reads the file to its end once it is not. Broken: told elsewhere
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, words)

    def _address(self) -> list[str]:
        """Where the run can be looked at, once."""
        if self._url_told or not self._state.exists():
            return []
        self._url_told = True
        url = json.loads(self._state.read_text(encoding="utf-8")).get("url")
        return [f"{self.name}: {url}"] if url else []

    def _gone(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        return f"{self.name} has stopped ({last}); the run goes on, see {self._log}"


def start_trackers(config: Config, *, first_step: int) -> list[TrackerProcess]:
    """A process for each of `logging.trackers`, of a run that begins or goes on at `first_step`."""
    run_dir = Path(expand(config.run_dir))
    name = config.logging.name or run_dir.resolve().name
    asked = Asked(config.logging.project, name, shareable(flatten(config)), first_step)
    return [TrackerProcess(tracker, run_dir, asked) for tracker in config.logging.trackers]
