"""Training from rollouts that another run has dumped: their prompts, responses and rewards, read
from its files instead of asked for, sampled and graded.

A step gets the same batch to the bit, so a run with the same settings learns the same; one with
other settings shows what they change, all else equal. Every rank reads the files by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.config import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.record.rollout_files import (
    RecordedRollout,
    find_steps,
    grouped,
    read_rollouts,
)
from megatron_bupo.rollout.engine import Capabilities, ServerHealth
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup, Sampling, SyncReport

if TYPE_CHECKING:
    from megatron_bupo.algorithm.bupo import Policy


class Replay:
    """Where a run's prompts, responses and grades come from: files. It is a `PromptStream`, a
    `RolloutEngine` and a `Grading` to the loop.
    """

    def __init__(self, directory: str) -> None:
        self._files = find_steps(Path(expand(directory)))
        self._groups: list[RolloutGroup] = []  # of the step whose prompts were asked for last

    def prompts_at(self, step: int) -> list[Prompt]:
        """What the dumped step asked."""
        self._groups = grouped(read_rollouts(self._files[step]))
        return [group.prompt for group in self._groups]

    def wait_until_up(self, say: Callable[[str], None]) -> None:
        """There is nothing to wait for."""

    def capabilities(self) -> Capabilities:
        """It only reads."""
        return Capabilities(
            name="replay", ahead=False, entropies=True, internal_policies=False, reproducible=True
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """The groups of the `prompts` that `prompts_at` has just given."""
        return self.begin(prompts, sampling).collect()

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> _Read:  # noqa: ARG002
        """As `generate`."""
        assert [group.prompt for group in self._groups] == list(prompts)
        return _Read(self._groups)

    def grade(self, groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
        """The grades that the dump holds."""
        return [[_grade(rollout) for rollout in group.rollouts] for group in groups]

    def load_weights(self, weights: Iterable[object], *, version: int) -> SyncReport:  # noqa: ARG002
        """Nobody samples from them."""
        return SyncReport(sent_bytes=0, seconds=0.0)

    def pause(self) -> AbstractContextManager[None]:
        """Nothing is ever under way."""
        return nullcontext()

    def sample_from(self, policy: Policy) -> None:
        """Refused: files hold what they hold."""
        raise NotImplementedError(f"a replay cannot sample from {policy}")

    def health(self) -> list[ServerHealth]:
        """No servers."""
        return []

    def close(self) -> None:
        """Nothing is held open."""


class _Read:
    """Groups that are there already."""

    def __init__(self, groups: list[RolloutGroup]) -> None:
        self._groups = groups

    def collect(self) -> list[RolloutGroup]:
        return self._groups


def _grade(rollout: Rollout) -> Grade:
    assert isinstance(rollout, RecordedRollout)
    return rollout.grade


def check_replay(config: Config, *, first_step: int, vocab_size: int) -> None:
    """The steps that `config` would train are there, and are batches that it can train on."""
    files = find_steps(Path(expand(config.debug.replay or "")))
    for step in range(first_step, config.steps):
        if step not in files:
            reason = f"step {step} is missing from {next(iter(files.values())).parent}"
            there = f"steps {min(files)} to {max(files)} are there"
            way_out = f"{there}; set steps={step}" if step else there
            raise InputError(f"debug.replay={config.debug.replay}", reason, way_out)
        _check_step(files[step], config, vocab_size)


def _check_step(path: Path, config: Config, vocab_size: int) -> None:
    rollouts = read_rollouts(path)
    sizes = [len(group.rollouts) for group in grouped(rollouts)]
    for key, asked, there in (
        ("prompts_per_step", config.rollout.prompts_per_step, {len(sizes)}),
        ("responses_per_prompt", config.rollout.responses_per_prompt, set(sizes)),
    ):
        if there != {asked}:
            found = " or ".join(map(str, sorted(there)))
            reason = f"{path} has {found}"
            raise InputError(f"rollout.{key}={asked}", reason, f"set rollout.{key}={found}")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for number, rollout in enumerate(rollouts, start=1):
        where, ids = f"{path}: line {number}", (*rollout.prompt.input_ids, *rollout.response_ids)
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            reason = f"token id {wrong[0]} is outside the model's vocabulary of {vocab_size}"
            raise InputError(where, reason, "set model.path to the model of the run that dumped it")
        if len(ids) > longest:
            limits = "data.max_prompt_tokens + rollout.max_response_tokens"
            reason = f"prompt and response have {len(ids)} tokens, more than {limits}={longest}"
            raise InputError(where, reason, "raise rollout.max_response_tokens")
        if not all(map(math.isfinite, (*rollout.rollout_logprobs, rollout.grade.reward))):
            raise InputError(where, "its rollout_logprobs or its reward are not finite")
