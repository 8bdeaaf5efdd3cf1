"""What came of the run, in one paragraph of measured numbers, and how to compare it with the same
without internal phases.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.load import HIDDEN
from megatron_bupo.config.server_rules import STARTED
from megatron_bupo.record.metrics import INTERNAL, read_metrics
from megatron_bupo.record.mismatch import KL, MEAN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_bupo.config.schema import Config

Record = dict[str, Any]

METHODS = {  # by `algorithm.advantage`
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce_plus_plus": "REINFORCE++",
    "reinforce_plus_plus_baseline": "REINFORCE++ with a baseline",
    "gae": "PPO",
}
ENDS = 5  # steps that stand for the beginning and the end of the run
FULL_NATS, INTERNAL_NATS = "entropy/full_nats", "entropy/internal_nats"
AVG_AT_K = re.compile(r"eval/(?!initial_)(.+)_avg_at_\d+")  # of a benchmark; its name
TRAINING = tuple(
    f"time/{name}_s"
    for name in ("old_logprobs", "ref_logprobs", "values", "update_critic", "update")
)
REPLACED = ("run_dir=", "bupo.internal_steps=", "bupo.stages=", "bupo.stages[", "bupo.guard")
SECRET = "servers.api_key="
GUARD = "guard.json"  # what the guard has left in run_dir


def summarise(
    run_dir: str | Path,
    config: Config,
    *,
    world_size: int | None = None,
    command: Sequence[str] | None = None,
) -> str:
    """The paragraph, then the command that trains the same without internal phases (if this had
    some).

    `world_size`: ranks that ran, None for as many as the layout asks for; `command`: the command
    line that started the run, None for this process's own.
    """
    records = read_metrics(run_dir)
    if not records:
        return f"{run_dir}: no step has finished yet."
    sentences = [
        _what_ran(records, config, world_size),
        _guard(Path(run_dir), records),
        _accuracy(records),
        _reward(records),
        _critic(records),
        _entropy(records),
        _mismatch(records),
        _time(records),
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    if any(record["policy"].startswith(INTERNAL) for record in records):
        plain = plain_command(sys.argv if command is None else command, run_dir, config)
        text += f"\nThe same with plain {_method(config)}, to compare: {plain}"
    return text


def plain_command(command: Sequence[str], run_dir: str | Path, config: Config) -> str:
    """`command`, changed to train without internal phases in a run directory of its own."""
    program, *arguments = command
    start = ["python", "-m", "megatron_bupo"] if program.endswith("__main__.py") else [program]
    gone = (*REPLACED, "servers.addresses=") if STARTED in os.environ else REPLACED
    kept = [_shown(argument) for argument in arguments if not argument.startswith(gone)]
    changed = ["bupo.stages=[]"] if config.bupo.stages else ["bupo.internal_steps=0"]
    changed += ["bupo.guard=false"] if config.bupo.guard.enabled else []
    return shlex.join([*start, *kept, *changed, f"run_dir={run_dir}-{config.algorithm.advantage}"])


def _shown(argument: str) -> str:
    """`argument` without a key to servers that it may hold."""
    held = argument.startswith(SECRET) and "${" not in argument
    return f"{SECRET}{HIDDEN}" if held else argument


def _method(config: Config) -> str:
    return METHODS[config.algorithm.advantage]


def _what_ran(records: Sequence[Record], config: Config, world_size: int | None) -> str:
    phases = [(policy, len(list(r))) for policy, r in groupby(records, lambda r: r["policy"])]
    name = _method(config)
    if any(policy.startswith(INTERNAL) for policy, _ in phases):
        name = "BuPO" if name == "GRPO" else f"BuPO with {name}"
    done = len(records)
    steps = f"{done} steps" if done >= config.steps else f"{done} of {config.steps} steps"
    layout = parallel_sizes(config, world_size)
    sizes = f"tp={layout.tp} pp={layout.pp} dp={layout.dp}"
    told = ", then ".join(
        f"{'the full policy' if policy == 'full' else policy} for {steps}"
        for policy, steps in phases
    )
    ranks = "1 process" if layout.world == 1 else f"{layout.world} processes"
    return f"{steps} of {name} over {ranks} ({sizes}): {told}."


def _guard(run_dir: Path, records: Sequence[Record]) -> str:
    """Why the internal phases ended before their time, if they did."""
    path = run_dir / GUARD
    if not any(record.get("guard/tripped") for record in records) or not path.exists():
        return ""
    left = json.loads(path.read_text(encoding="utf-8"))
    kept = f"; {left['checkpoint']} is of before" if left["checkpoint"] else ""
    return f"The guard ended {left['policy']}: {'; '.join(left['reasons'])}{kept}."


def _accuracy(records: Sequence[Record]) -> str:
    before = [v for r in records if (v := r.get("eval/initial_accuracy_mean")) is not None]
    after = [record for record in records if "eval/accuracy_mean" in record]
    if not after:
        return ""
    last = after[-1]
    matched = ((AVG_AT_K.fullmatch(key), value) for key, value in last.items())
    named = ", ".join(f"{match[1]} {value:.3f}" for match, value in matched if match)
    start = f"{before[0]:.3f} before training, " if before else ""
    end = f"{last['eval/accuracy_mean']:.3f}{f' ({named})' if named else ''}"
    return f"Accuracy on held-out prompts: {start}{end} after step {last['step'] + 1}."


def _reward(records: Sequence[Record]) -> str:
    rewards = [record["rollout/reward_mean"] for record in records]
    first, last = fmean(rewards[:ENDS]), fmean(rewards[-ENDS:])
    text = f"Mean reward: {first:.3f} over the first {ENDS} steps, {last:.3f} over the last {ENDS}."
    if len(records) <= ENDS:
        text = f"Mean reward: {first:.3f}."
    warnings = sum(record.get("rollout/reward_warnings", 0.0) for record in records)
    return text + (f" {warnings:.0f} responses could not be graded." if warnings else "")


def _critic(records: Sequence[Record]) -> str:
    """How much of what returns differ in PPO's critic foresaw."""
    explained = [v for r in records if (v := r.get("critic/explained_variance")) is not None]
    if not explained:
        return ""
    first, last = fmean(explained[:ENDS]), fmean(explained[-ENDS:])
    return f"Of the returns' variance the critic foresaw {first:.2f} at first, {last:.2f} at last."


def _entropy(records: Sequence[Record]) -> str:
    """First and last entropies: the full policy's, and each internal one's within its phase."""
    measured = {"full policy": [r[FULL_NATS] for r in records if FULL_NATS in r]}
    for record in records:
        if INTERNAL_NATS in record:
            measured.setdefault(record["policy"], []).append(record[INTERNAL_NATS])
    told = [f"{name} {of[0]:.3f} to {of[-1]:.3f}" for name, of in measured.items() if of]
    return f"Entropy in nats per token: {', '.join(told)}." if told else ""


def _mismatch(records: Sequence[Record]) -> str:
    """What parts trainer and sampler about the full policy, at the steps where it was measured."""
    gaps = [record[MEAN] for record in records if MEAN in record]
    if not gaps:
        return ""
    kl = max(record.get(KL, 0.0) for record in records)
    return f"Trainer and sampler: {fmean(gaps):.1g} nats a token apart, KL at most {kl:.1g}."


def _time(records: Sequence[Record]) -> str:
    def total(*keys: str) -> float:
        return sum(record.get(key, 0.0) for record in records for key in keys)

    seconds = total("time/step_s")
    if not seconds:
        return ""
    generating = total("time/generate_s") / seconds
    training = total(*TRAINING) / seconds
    return f"Steps took {seconds:.0f} s: {generating:.0%} generating, {training:.0%} training."
