"""What is each run, in what do they differ, and what did they come to? Tables for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_bupo.config.load import flatten
from megatron_bupo.config.schema import Config
from megatron_bupo.config.tracker_rules import shareable
from megatron_bupo.record.figure import phases
from megatron_bupo.record.metrics import INTERNAL
from megatron_bupo.record.report.curves import (
    Shown,
    called_or_seeded,
    curve,
    half_width,
    running_total,
)
from megatron_bupo.record.report.runs import RunRecord
from megatron_bupo.record.summary import ENDS, FULL_NATS, METHODS

ACCURACY = "eval/accuracy_mean"


@dataclass(frozen=True)
class Identity:
    """What a run is."""

    name: str
    method: str
    model: str
    trained: str  # which policy for how many steps
    steps: str
    seed: str
    guard: str
    path: str


@dataclass(frozen=True)
class Result:
    """A number that a run came to."""

    value: float
    half: float | None = None  # of its interval over seeds
    step: int | None = None  # behind the policy it is of


@dataclass(frozen=True)
class Fact:
    """A column of the table of results: `results` of each line, None where it is not known."""

    label: str
    kind: str  # share | nats | number | count | seconds | hours: how it is written
    results: list[Result | None]


def identity(shown: Shown) -> Identity:
    """What the run or the runs of `shown` are."""
    runs = shown.runs
    return Identity(
        name=shown.name,
        method=_said(map(_method, runs)),
        model=_said(map(_model, runs)),
        trained=_said(map(_trained, runs)),
        steps=_said(map(_steps, runs)),
        seed=_said(str(_setting(run, "seed")) for run in runs),
        guard=_said(map(guard_story, runs), between="; "),
        path="\n".join(str(run.path) for run in runs),
    )


def _said(texts: Iterable[str], *, between: str = ", ") -> str:
    """What several runs say, each thing once."""
    return between.join(dict.fromkeys(text for text in texts if text))


def _setting(run: RunRecord, key: str) -> Any:
    return "" if run.settings is None else run.settings.get(key, "")


def _method(run: RunRecord) -> str:
    if run.settings is None:
        return "BuPO" if _has_internal(run) else ""
    advantage = str(_setting(run, "algorithm.advantage"))
    name = METHODS.get(advantage, advantage)
    if _has_internal(run):
        name = "BuPO" if name == "GRPO" else f"BuPO with {name}"
    loss = _setting(run, "algorithm.loss")
    more = [str(loss).upper()] if loss not in {"", "clipped"} else []
    if _setting(run, "hicra.grams") and _setting(run, "hicra.alpha"):
        more.append("HICRA")
    return " + ".join([name, *more])


def _has_internal(run: RunRecord) -> bool:
    return any(record["policy"].startswith(INTERNAL) for record in run.records)


def _model(run: RunRecord) -> str:
    """The last two parts of its path: the last alone is often `model`."""
    return "/".join(str(_setting(run, "model.path")).rstrip("/").split("/")[-2:])


def _trained(run: RunRecord) -> str:
    told = (
        f"{'full policy' if policy == 'full' else policy} for {len(steps)}"
        for policy, steps in phases(run.records)
    )
    return ", then ".join(told)


def _steps(run: RunRecord) -> str:
    done = run.records[-1]["step"] + 1 if run.records else 0
    asked = _setting(run, "steps")
    if not isinstance(asked, int) or done >= asked:
        return f"{done:,}"
    return f"{done:,} of {asked:,}" if done else f"none of {asked:,} yet"


def guard_story(run: RunRecord) -> str:
    """What the guard against collapse did; empty: there was none."""
    if run.guard is not None:
        reasons = run.guard.get("reasons")
        why = "; ".join(map(str, reasons)) if isinstance(reasons, list) else "no reason recorded"
        kept = run.guard.get("checkpoint")
        policy, step = (run.guard.get(key, "?") for key in ("policy", "left_before_step"))
        return f"left {policy} before step {step}: {why}" + (f" (kept {kept})" if kept else "")
    return "watched, let it pass" if _setting(run, "bupo.guard.enabled") is True else ""


def differences(shown: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """`(key, what each has)` of the settings in which the runs differ; of a single line, those
    that are not the defaults. A setting that a run does not know has its default.
    """
    defaults = {**flatten(Config()), "model.path": ""}
    known = [run.settings for one in shown for run in one.runs if run.settings is not None]
    if len(shown) == 1:
        known.append(defaults)
    told = []
    for key in sorted({key for settings in known for key in settings}):
        has = {_plain(settings.get(key, defaults.get(key, ""))) for settings in known}
        if len(has) > 1 and not called_or_seeded(key):
            told.append((key, [_said(_shown(run, key, defaults) for run in s.runs) for s in shown]))
    return told


def _shown(run: RunRecord, key: str, defaults: Mapping[str, Any]) -> str:
    if run.settings is None:
        return ""
    value = run.settings.get(key, defaults.get(key, ""))
    return _plain(shareable({key: value})[key])


def _plain(value: Any) -> str:
    """As one would write it; of an empty mapping nothing, for its keys would stand alone."""
    if value == {}:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def results(shown: Sequence[Shown]) -> list[Fact]:
    """What the runs came to; a column that no run has is left out."""
    columns: tuple[tuple[str, str, Callable[[RunRecord], Result | None]], ...] = (
        ("accuracy before", "share", _initial),
        ("accuracy at the end", "share", lambda run: _accuracy(run, best=False)),
        ("best accuracy", "share", lambda run: _accuracy(run, best=True)),
        ("reward", "number", lambda run: _last(run, "rollout/reward_mean")),
        ("entropy of the full policy at first", "nats", lambda run: _first(run, FULL_NATS)),
        ("entropy at the end", "nats", lambda run: _last(run, FULL_NATS)),
        ("response tokens", "count", lambda run: _last(run, "rollout/response_tokens_mean")),
        ("truncated", "share", lambda run: _last(run, "rollout/truncated_fraction")),
        ("tokens sampled", "count", lambda run: _total(run, "rollout/sampled_tokens")),
        ("seconds per step", "seconds", lambda run: _mean(run, "time/step_s")),
        ("hours", "hours", lambda run: _total(run, "time/step_s", per=3600.0)),
    )
    facts = []
    for label, kind, of in columns:
        known = [_over_seeds([of(run) for run in one.runs if run.records]) for one in shown]
        if any(result is not None for result in known):
            facts.append(Fact(label, kind, known))
    return facts


def _over_seeds(found: Sequence[Result | None]) -> Result | None:
    known = [result for result in found if result is not None and math.isfinite(result.value)]
    if len(known) < 2:
        return known[0] if known else None
    values = [result.value for result in known]
    steps = {result.step for result in known}
    return Result(fmean(values), half_width(values), steps.pop() if len(steps) == 1 else None)


def _finite(run: RunRecord, key: str) -> list[tuple[float, float]]:
    found = curve(Shown(run.name, (run,)), key)
    return [(x, y) for x, y in zip(found.at, found.values, strict=True) if math.isfinite(y)]


def _initial(run: RunRecord) -> Result | None:
    before = [y for x, y in _finite(run, ACCURACY) if x == 0]
    return Result(before[0]) if before else None


def _accuracy(run: RunRecord, *, best: bool) -> Result | None:
    measured = [(x, y) for x, y in _finite(run, ACCURACY) if x > 0]
    if not measured:
        return None
    step, value = max(measured, key=lambda point: point[1]) if best else measured[-1]
    return Result(value, step=int(step))


def _first(run: RunRecord, key: str) -> Result | None:
    values = [y for _, y in _finite(run, key)][:ENDS]
    return Result(fmean(values)) if values else None


def _last(run: RunRecord, key: str) -> Result | None:
    values = [y for _, y in _finite(run, key)][-ENDS:]
    return Result(fmean(values)) if values else None


def _mean(run: RunRecord, key: str) -> Result | None:
    values = [y for _, y in _finite(run, key)]
    return Result(fmean(values)) if values else None


def _total(run: RunRecord, key: str, *, per: float = 1.0) -> Result | None:
    total = running_total(Shown(run.name, (run,)), key)
    return None if total is None else Result(total.values[-1] / per)
