"""Which rank holds the others up? Each writes down where it stands; when nobody gets on, one tells.

::

    run_dir/ranks/rank-00003.json       where rank 3 stands, written anew every few seconds
    run_dir/ranks/rank-00003.stack.txt  its threads' stacks, when it last stood still for `stall_s`
    run_dir/stall.txt                   the reports, which also go to stderr

A thread beside the main one looks at `progress`; while the rank gets on, that is all. When it has
stood still for `stall_s` seconds (perhaps it only waits), the thread writes down the stacks, reads
what other ranks have written, and reports unless somebody gets on. Of the ranks that stand still
the lowest one alive reports: so one tells, even if rank 0 is the one that is stopped or dead, and
the others hardly read. The run directory is all they share: a process group that hangs is no place
to talk about it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from megatron_bupo import progress
from megatron_bupo.record.stall import RankState, report

MAX_TICK_S, MAX_PERIOD_S = 1.0, 10.0
WRITES_PER_STALL = 20  # in `stall_s`, at least; a rank that misses half of them is silent
FOLDER = "ranks"
OURS = f"{Path(__file__).parents[1]}{os.sep}"


def state_file(run_dir: Path, rank: int) -> Path:
    """What `rank` writes down."""
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def heartbeat(run_dir: Path, world: int, stall_s: float) -> AbstractContextManager[object]:
    """What notices when the ranks hang, in whatever they do from here on; 0: nothing does."""
    if not stall_s:
        return contextlib.nullcontext()
    rank = int(os.environ.get("RANK", "0"))  # known before the process group is
    return Heartbeat(run_dir, rank=rank, world=world, stall_s=stall_s)


class Heartbeat:
    """A context manager around all that this rank does; to be entered by its main thread, after
    all forks.

    SIGUSR1 makes the process print the stacks of its threads, whatever they hang in.
    """

    def __init__(self, run_dir: Path, *, rank: int, world: int, stall_s: float) -> None:
        self.run_dir, self.rank, self.world, self.stall_s = run_dir, rank, world, stall_s
        self._file = state_file(run_dir, rank)
        self._period_s = min(MAX_PERIOD_S, stall_s / WRITES_PER_STALL)
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._ended = threading.Event()
        self._seen = (0, 0)  # phases begun and beats, when last looked
        self._began = self._progressed = self._ticked = time.monotonic()
        self._written = (-1, 0.0)  # phases begun and time, when last written
        self._still = self._reported = False

    def __enter__(self) -> Heartbeat:
        progress.enter("load", None)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            for left in self._file.parent.glob("rank-*.json*") if self.rank == 0 else ():
                left.unlink(missing_ok=True)  # by a killed run, or written anew soon
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR1)
        with contextlib.suppress(OSError):
            if kind is None:
                self._file.unlink(missing_ok=True)
                self._file.parent.rmdir()  # the last rank does, if there are no stacks to keep
            else:
                failure = f"{kind.__name__}: {error}".partition("\n")[0]
                self._write(replace(self._state(), failure=failure))

    def _beat(self) -> None:
        while not self._ended.wait(min(MAX_TICK_S, self._period_s)):
            with contextlib.suppress(OSError):  # a full disk is for others to complain of
                self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        if now - self._ticked > self.stall_s / 2:  # it was stopped as a whole: not its own fault
            self._progressed = now
        self._ticked = now
        seen = progress.position().number, progress.beats()
        if seen != self._seen:
            self._gets_on(now)
        self._seen = seen
        if seen[0] == self._written[0] and now - self._written[1] < self._period_s:
            return
        if not self._still and now - self._progressed >= self.stall_s:
            self._still = True
            self._file.with_suffix(".stack.txt").write_text(self._stacks())
        self._write(self._state())
        self._written = seen[0], now
        if self._still and not self._reported:
            self._look()

    def _gets_on(self, now: float) -> None:
        if self._reported:
            self._tell(f"ranks get on again after {now - self._progressed:.0f} s")
        self._progressed, self._still, self._reported = now, False, False

    def _look(self) -> None:
        """Report, unless a rank gets on, or a lower one is alive to do it."""
        states: list[RankState] = []
        now = self._file.stat().st_mtime  # just written: by the file system's clock, not the node's
        for rank in range(self.world):
            state = self._read(rank, now)
            if not state.silent_s and (state.idle_s < self.stall_s or rank < self.rank):
                return
            states.append(state)
        self._reported = True
        self._tell(report(states, run_dir=self.run_dir, stall_s=self.stall_s))

    def _tell(self, text: str) -> None:
        text = f"{datetime.now().astimezone().isoformat(' ', 'seconds')} {text}\n"
        with contextlib.suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)
        with (self.run_dir / "stall.txt").open("a") as file:
            file.write(text)

    def _state(self) -> RankState:
        place, now = progress.position(), time.monotonic()
        at, waits = _at(self._main) if self._still else ("", False)
        return RankState(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=place.phase,
            step=place.step,
            number=place.number,
            phase_s=round(now - place.since, 3),
            idle_s=round(now - self._progressed, 3),
            at=at,
            waits=waits,
        )

    def _write(self, state: RankState) -> None:
        work = self._file.with_suffix(".json.new")
        work.write_text(json.dumps(asdict(state)) + "\n")
        work.replace(self._file)

    def _read(self, rank: int, now: float) -> RankState:
        """What `rank` has written, and whether it still does."""
        file = state_file(self.run_dir, rank)
        try:
            state, age_s = RankState(**json.loads(file.read_text())), now - file.stat().st_mtime
        except (FileNotFoundError, ValueError, TypeError):  # TypeError: of another version
            age_s = time.monotonic() - self._began
            state = RankState(rank, "", 0, "", None, -1, 0.0, 0.0)
        return replace(state, silent_s=age_s if age_s > self.stall_s / 2 else 0.0)

    def _stacks(self) -> str:
        """The stacks of all threads but this one, the main one's first."""
        frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
        del frames[threading.get_ident()]
        threads = sorted(frames, key=lambda thread: thread != self._main)
        return "\n".join(
            f"thread {names.get(thread, thread)}, most recent call last:\n"
            + "".join(traceback.format_stack(frames[thread]))
            for thread in threads
        )


def _at(thread: int) -> tuple[str, bool]:
    """The innermost calls of `thread`, its last and ours that led there; and do they wait for other
    ranks?
    """
    stack = traceback.extract_stack(sys._current_frames()[thread])
    inner = stack[-1]
    ours = [frame for frame in stack[:-1] if frame.filename.startswith(OURS)][-1:]
    calls = (f"{f.name} ({Path(f.filename).name}:{f.lineno})" for f in (inner, *ours))
    waits = ".wait(" in (inner.line or "") or "torch/distributed" in Path(inner.filename).as_posix()
    return " < ".join(calls), waits
