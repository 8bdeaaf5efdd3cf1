"""Settings of `debug` that exclude each other or others."""

from __future__ import annotations

from pathlib import Path

from megatron_bupo.config.load import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError


def check_debug(config: Config) -> None:
    """A replayed run has no engine; one that only generates does not train."""
    debug = config.debug
    if debug.replay is None:
        return
    where = f"debug.replay={debug.replay}"
    if debug.rollout_only:
        reason = "generates nothing, and debug.rollout_only=true does nothing else"
        raise InputError(where, reason, "leave one of them out")
    if config.evaluation.every:
        reason = f"has no engine that evaluation.every={config.evaluation.every} could sample from"
        raise InputError(where, reason, "set evaluation.every=0")
    run_dir = Path(expand(config.run_dir)).resolve()
    if Path(expand(debug.replay)).resolve() in {run_dir, run_dir / "rollouts"}:
        reason = f"is of run_dir={config.run_dir} itself"
        raise InputError(where, reason, "choose another run_dir for the run that replays it")
