"""Nobody gets on: who is to blame? From where each rank stands to a report that names ranks.

Ranks run the same phases in the same order, and one that hangs makes all others wait for it in some
collective. So the culprit is one without a sign of life; else one that does not wait for anybody,
of those the furthest behind; else whoever is behind, for on a GPU Python does not see who waits.

::

    no rank has got on for 612 s (logging.stall_s=600):
      ranks 0-2, 5: update of step 13 for 612 s, all_reduce (distributed_c10d.py:3180) < ...
      rank 4: update of step 13 for 612 s, recv (socket.py:88) < grade (grader.py:107)
      rank 7: no sign of life for 655 s, last in grade of step 13
    likely culprit: rank 7 (no sign of life): process 4711 on node17
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_bupo.config.timeouts import COLLECTIVE_TIMEOUT_S

PROCESSES_SHOWN = 8


@dataclass(frozen=True)
class RankState:
    """Where one rank stands, as it wrote it down itself; durations in seconds."""

    rank: int
    host: str
    pid: int  # 0: it has not written anything
    phase: str
    step: int | None  # counted from 0; None: of no step
    number: int  # phases begun: who has begun fewer is behind
    phase_s: float
    idle_s: float  # without progress
    at: str = ""  # the innermost calls, once it stands still
    waits: bool = False  # are those calls waiting for other ranks?
    failure: str = ""  # the error that ended it
    silent_s: float = 0.0  # without a sign of life, as who reads it finds; 0: it is alive

    def place(self) -> str:
        """E.g. `update of step 13`: a person counts steps from 1."""
        return self.phase if self.step is None else f"{self.phase} of step {self.step + 1}"


def report(states: Sequence[RankState], *, run_dir: Path, stall_s: float) -> str:
    """What a person needs to know of a stall: who stands where, who is to blame, what to do."""
    blamed, reason = culprits(states)
    idle_s = min((state.idle_s for state in states if not state.silent_s), default=stall_s)
    lines = [f"no rank has got on for {idle_s:.0f} s (logging.stall_s={stall_s:g}):"]
    lines += [f"  {line}" for line in _table(states)]
    if blamed:
        known = [f"process {s.pid} on {s.host}" for s in blamed if s.pid][:PROCESSES_SHOWN]
        text = f"{_numbered(blamed)} ({reason}){': ' if known else ''}{', '.join(known)}"
        lines.append(f"likely culprit: {text}")
    else:
        lines.append("likely culprit: cannot be told, for all stand in one phase; see their stacks")
    if any(state.silent_s for state in states):
        lines.append("silent ranks: look for a lost node, a kill (dmesg), a stopped process (ps)")
    lines += [
        f"stacks: {run_dir / 'ranks'}/rank-*.stack.txt; kill -USR1 PID prints those of the moment",
        f"{COLLECTIVE_TIMEOUT_S:g} s after they began the collectives give up, which ends the job",
        "if this is a long phase and no stall, raise logging.stall_s",
    ]
    return "\n".join(lines)


def culprits(states: Sequence[RankState]) -> tuple[list[RankState], str]:
    """The ranks that probably hold the others up (none: cannot be told), and what gives them
    away.
    """
    silent = [state for state in states if state.silent_s]
    if silent:
        return silent, "no sign of life"
    active = [state for state in states if not state.waits]
    if len(active) < len(states):
        behind = [state for state in active if state.number == min(s.number for s in active)]
        if behind:
            return behind, "waits for nobody, and others wait"
    last, first = (pick(state.number for state in states) for pick in (min, max))
    behind = [state for state in states if state.number == last < first]
    return behind, "behind the others"


def _table(states: Sequence[RankState]) -> Iterator[str]:
    """A line for all ranks that stand at one place; the furthest first, the silent last."""

    def where(state: RankState) -> tuple[bool, int, str, str, str]:
        return state.silent_s > 0, -state.number, state.place(), state.at, state.failure

    for _, group in groupby(sorted(states, key=where), key=where):
        ranks = list(group)
        yield f"{_numbered(ranks)}: {_stand(ranks)}"


def _stand(ranks: Sequence[RankState]) -> str:
    """How long the ranks of one group have stood where."""
    one = ranks[0]
    if not one.silent_s:
        calls = f", {one.at}" if one.at else ""
        return f"{one.place()} for {max(s.phase_s for s in ranks):.0f} s{calls}"
    silence = f"no sign of life for {max(s.silent_s for s in ranks):.0f} s"
    if not one.pid:
        return f"{silence}, it has not begun"
    failed = f", where it failed with {one.failure}" if one.failure else ""
    return f"{silence}, last in {one.place()}{failed}"


def _numbered(states: Sequence[RankState]) -> str:
    """E.g. `rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(state.rank for state in states):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return f"rank{'s' * (len(states) > 1)} {', '.join('-'.join(map(str, s)) for s in spans)}"
