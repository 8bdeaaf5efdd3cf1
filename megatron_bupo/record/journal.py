"""A run's journal: what each step did, how long each part took, told to the disk and to the person
watching.

Every rank keeps one, only the first rank's speaks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_bupo import progress
from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.record.console import Display
from megatron_bupo.record.metrics import MetricsLog, read_metrics
from megatron_bupo.record.rollout_files import Learned, write_rollouts
from megatron_bupo.record.trackers import TrackerProcess, start_trackers
from megatron_bupo.types import Grade, RolloutGroup

ACTIVITIES = {  # name in time/..._s: what the display says
    "probe": "probing",
    "generate": "generating responses",
    "grade": "grading",
    "old_logprobs": "old log-probs",
    "ref_logprobs": "reference log-probs",
    "values": "asking the critic",
    "compare": "comparing trainer and sampler",
    "planning": "finding planning tokens",
    "update_critic": "updating the critic",
    "update": "updating",
    "sync": "syncing weights",
    "dump": "writing rollouts",
    "evaluate": "evaluating",
    "checkpoint": "saving a checkpoint",
    "relayout": "building the next phase's actor",
    "export": "exporting the model",
}
BETWEEN = "what is between phases"  # to the heartbeat


class Journal:
    """A context manager for the run; `with journal.step(...)` for a step, `doing(...)` for a
    part of it.
    """

    def __init__(self, run_dir: Path, config: Config, *, first_step: int, speaks: bool) -> None:
        self._log = None
        self._trackers: list[TrackerProcess] = []
        self._finished = False
        self._run_dir = run_dir
        self._dumps = config.debug.dump_rollouts or config.debug.rollout_only
        history = []
        if speaks:
            tensorboard = config.logging.tensorboard
            self._log = MetricsLog(run_dir, first_step=first_step, tensorboard=tensorboard)
            history = read_metrics(run_dir)
            self._trackers = start_trackers(config, first_step=first_step)
        self.display = Display(
            config.steps,
            title=str(run_dir),
            history=history,
            on=speaks,
            live=config.logging.progress,
        )
        self._metrics: dict[str, float] = {}
        self._step: int | None = None

    def __enter__(self) -> Journal:
        self.display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.__exit__(*error)  # type: ignore[arg-type]
        for tracker in self._trackers:
            for told in tracker.close(finished=self._finished):
                self.say(told)
        if self._log is not None:
            self._log.close()

    @contextmanager
    def step(self, step: int, policy: Policy) -> Iterator[None]:
        """One step of the loop, which trains `policy`; its line is on disk when the block has
        ended.
        """
        self.display.step_begins(policy)
        start = time.perf_counter()
        self._step = step
        progress.enter(BETWEEN, step)
        yield
        self.note({"time/step_s": time.perf_counter() - start})
        metrics, self._metrics = self._metrics, {}
        if self._log is not None:
            self.display.step_done(self._log.write(step, policy, metrics))
        for tracker in self._trackers:
            for told in tracker.step_done():
                self.say(told)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Part of a step, timed under `time/ACTIVITY_s`. A checkpoint counts for the step that
        follows it.
        """
        start = time.perf_counter()
        progress.enter(activity, self._step)
        with self.display.doing(ACTIVITIES[activity]):
            yield
        progress.enter(BETWEEN, self._step)
        key = f"time/{activity}_s"
        self._metrics[key] = self._metrics.get(key, 0.0) + time.perf_counter() - start

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the step's line."""
        self._metrics.update(metrics)

    def dump(
        self,
        groups: Sequence[RolloutGroup],
        grades: Sequence[Sequence[Grade]],
        learned: Learned | None = None,
    ) -> None:
        """Write the step's rollouts down, where `debug` asks for it."""
        if not self._dumps:
            return
        with self.doing("dump"):
            if self._log is not None:
                assert self._step is not None
                write_rollouts(self._run_dir, self._step, groups, grades, learned)

    def conclude(self, text: str) -> None:
        """The last words, below the display."""
        self._finished = True
        self.display.__exit__(None, None, None)
        self.say(text)

    def say(self, text: str) -> None:
        """A line for the person watching."""
        self.display.say(text)
