"""When has an internal phase gone on for too long?

The paper trains an internal layer 30 steps, and loses 16 points with 50: the full policy collapses
while the internal one learns. So each probe of an internal phase is compared with the one before
training; when bounds of `bupo.guard` are crossed by `patience` probes in a row, the full policy
trains from that very step on. It is decided by what probes say alone: a resumed run decides alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_bupo.algorithm.bupo import InternalLayerPolicy, Policy
from megatron_bupo.checkpoints import checkpoint_dir, read_run
from megatron_bupo.config.schema import GuardConfig
from megatron_bupo.durable import replace_text
from megatron_bupo.errors import InputError
from megatron_bupo.record.summary import GUARD

# Bound: the metric that it bounds, and whether it is a ratio to what that was or an increase
METRICS = {
    "perplexity_ratio": ("probe/perplexity", True),
    "kl_increase_nats": ("probe/kl_internal_to_full_nats", False),
    "entropy_increase_nats": ("probe/full_entropy_nats", False),
    "repetition_increase": ("probe/repetition_fraction", False),
    "response_tokens_ratio": ("probe/response_tokens_mean", True),
}


def bounds_of(guard: GuardConfig) -> dict[str, float]:
    """The bounds that are set."""
    return {n: value for n in METRICS if (value := getattr(guard, n)) is not None}


def crossings(
    guard: GuardConfig, before: Mapping[str, float], now: Mapping[str, float]
) -> Iterator[str]:
    """What of a probe `now` is out of bounds, beside that `before` training; in words. What is not
    a number is out of all.
    """
    for name, bound in bounds_of(guard).items():
        metric, is_ratio = METRICS[name]
        was, is_now = before[metric], now[metric]
        within = is_now <= was * bound if is_ratio else is_now - was <= bound
        if not within:
            yield (
                f"{metric} is {is_now:.4g}, and was {was:.4g} before training "
                f"(bupo.guard.{name}={bound})"
            )


@dataclass(frozen=True)
class Watch:
    """What the guard of a run remembers; it travels in checkpoints."""

    baseline: Mapping[str, float] = field(default_factory=dict)  # what is bounded, at step 0
    crossings: int = 0  # probes in a row
    within: int | None = None  # step of the newest probe within bounds
    left_before: int | None = None  # the step from which on the full policy trains

    @classmethod
    def of(cls, path: Path | None) -> Watch:
        """As the checkpoint at `path` has it; None, or one from before there were guards: new."""
        known = {} if path is None else read_run(path).get("guard", {})
        return cls(**known)

    def begin(self, seen: Mapping[str, float]) -> Watch:
        """With the probe `seen` before training."""
        bounded = {metric for metric, _ in METRICS.values()}
        return replace(self, baseline={k: v for k, v in seen.items() if k in bounded})

    def after(
        self, step: int, seen: Mapping[str, float], guard: GuardConfig
    ) -> tuple[Watch, list[str]]:
        """With the probe `seen` in an internal phase, before `step`; and what of it is out of
        bounds.
        """
        reasons = list(crossings(guard, self.baseline, seen))
        if not reasons:
            return replace(self, crossings=0, within=step), []
        count = self.crossings + 1
        left_before = step if count >= guard.patience else None
        return replace(self, crossings=count, left_before=left_before), reasons


def check_baseline(guard: GuardConfig, watch: Watch, path: Path) -> None:
    """A run that goes on from the checkpoint at `path` knows what it was like before training."""
    for name in bounds_of(guard) if guard.enabled else ():
        metric, _ = METRICS[name]
        if metric not in watch.baseline:
            raise InputError(
                f"bupo.guard.{name}={getattr(guard, name):g}",
                f"{path} is of a run that did not look at {metric} before its first step",
                "set it to null, or bupo.guard=false, or choose another run_dir",
            )


class Guard:
    """The guard of a run: what it remembers, and what it does about it. Every rank has one, only
    the first rank's `writes`.
    """

    def __init__(
        self, config: GuardConfig, run_dir: Path, watch: Watch, *, writes: bool = True
    ) -> None:
        self.config, self.watch, self._writes = config, watch, writes
        self._path = run_dir / GUARD
        self._looked = -1, watch  # the step of the last probe, and what was known before it
        if watch.left_before is None and writes:  # one may have acted after where this run goes on
            self._path.unlink(missing_ok=True)

    def judge(self, step: int, policy: Policy, seen: Mapping[str, float]) -> list[str] | None:
        """What of the probe `seen` before `step`, which is to train `policy`, is out of bounds;
        None: it is not for the guard to say.
        """
        self._looked = step, self.watch
        if not self.config.enabled:
            return None
        if step == 0:
            self.watch = self.watch.begin(seen)
        if not isinstance(policy, InternalLayerPolicy):
            return None
        self.watch, reasons = self.watch.after(step, seen, self.config)
        return reasons

    def has_left(self, step: int) -> bool:
        """Have the internal phases come to an end before `step`?"""
        return self.watch.left_before == step

    def state_before(self, step: int) -> dict[str, Any]:
        """What a checkpoint of the state before `step` remembers: whoever goes on from it looks
        for himself.
        """
        looked, before = self._looked
        return asdict(before if looked == step else self.watch)

    def spared(self, policy: Policy) -> int | None:
        """The step whose checkpoint is kept come what may, when `policy` is the next to train."""
        watches = self.config.enabled and isinstance(policy, InternalLayerPolicy)
        return self.watch.within if watches or self.watch.left_before is not None else None

    def write_down(self, policy: Policy, reasons: Sequence[str]) -> str:
        """Leave run_dir/guard.json of the step before which `policy` was left; a line about it."""
        step, within = self.watch.left_before, self.watch.within
        assert step is not None
        path = None if within is None else checkpoint_dir(Path(), within)
        left = {
            "left_before_step": step,
            "policy": str(policy),
            "reasons": [*reasons],
            "bounds": bounds_of(self.config) | {"patience": self.config.patience},
            "checkpoint": None if path is None else str(path),
        }
        if self._writes:
            replace_text(self._path, json.dumps(left, indent=2) + "\n")
        kept = "" if path is None else f"; {path} is of before"
        return (
            f"guard: step {step + 1} and all after it train the full policy, and no longer "
            f"{policy}: {'; '.join(reasons)}{kept}"
        )
