"""Responses are begun as early as their staleness allows, and are otherwise those of `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_bupo.bed import chain_sums
from megatron_bupo.rollout.ahead import RolloutStream
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.types import Prompt, RolloutGroup, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

STEPS, FULL_FROM = 7, 3


class EagerEngine(EmbeddedEngine):
    """Responses under way are those of the weights with which they were begun."""

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
        return _Done(self.generate(prompts, sampling))


class _Done:
    def __init__(self, groups: list[RolloutGroup]) -> None:
        self.groups = groups

    def collect(self) -> list[RolloutGroup]:
        return self.groups


def prompts_at(step: int) -> list[Prompt]:
    texts = (f"{step}+{i}=" for i in range(2))
    return [Prompt(10 * step + i, tuple(chain_sums.encode(t)), "", t) for i, t in enumerate(texts)]


def sampling_at(step: int) -> Sampling:
    return Sampling(responses_per_prompt=2, max_response_tokens=6, temperature=1.0, seed=step)


@pytest.fixture
def engine(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> EagerEngine:
    chain_sums.save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    return EagerEngine(tiny_model_dir(vocab=16), tokenizer, batch_size=8)


def train(engine: EmbeddedEngine, version: int) -> None:
    """Weights of `version`: a function of it, so that any two versions can be told apart."""
    generator = torch.Generator().manual_seed(version)
    weight = torch.randn(16, 32, generator=generator)
    engine.load_weights([("lm_head.weight", weight)], version=version)


def run(
    engine: EmbeddedEngine, staleness_at: Callable[[int], int], *, first_step: int = 0
) -> list[list[RolloutGroup]]:
    """What every step gets, and the weights of the step are loaded after it."""
    train(engine, first_step)
    stream = RolloutStream(
        engine,
        prompts_at,
        sampling_at,
        first_step=first_step,
        last_step=STEPS,
        staleness_at=staleness_at,
    )
    got = []
    for step in range(first_step, STEPS):
        got.append(stream.at(step))
        behind = [step - r.policy_version for group in got[-1] for r in group.rollouts]
        assert stream.measures()["rollout/staleness_max"] == max(behind)
        assert stream.measures()["rollout/staleness_mean"] == sum(behind) / len(behind)
        assert ("time/ahead_s" in stream.measures()) == (max(behind) > 0)
        train(engine, step + 1)
    return got


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("first_step", [0, 2])
def test_a_step_is_what_the_oldest_allowed_weights_say_to_its_prompts_with_its_seed(
    engine: EagerEngine, ahead: int, first_step: int
):
    for step, groups in enumerate(
        run(engine, lambda _: ahead, first_step=first_step), start=first_step
    ):
        train(engine, max(step - ahead, first_step))
        assert groups == engine.generate(prompts_at(step), sampling_at(step))


def test_a_phase_that_must_be_on_policy_is_and_the_next_is_begun_under_its_last_weights(
    engine: EagerEngine,
):
    got = run(engine, lambda step: 2 if step >= FULL_FROM else 0)
    versions = [{r.policy_version for group in step for r in group.rollouts} for step in got]
    assert versions == [{0}, {1}, {2}, {2}, {2}, {3}, {4}]


def test_an_engine_that_generates_when_asked_to_collect_is_on_policy_with_any_staleness(
    tiny_model_dir: Callable[..., Path], engine: EagerEngine
):
    lazy = EmbeddedEngine(tiny_model_dir(vocab=16), engine.tokenizer, batch_size=8)
    streams = []
    for staleness in (0, 2):
        stream = RolloutStream(
            lazy,
            prompts_at,
            sampling_at,
            first_step=0,
            last_step=STEPS,
            staleness_at=lambda _, staleness=staleness: staleness,
        )
        got = []
        for step in range(STEPS):
            train(lazy, step)
            got.append(stream.at(step))
        streams.append(got)
    assert streams[0] == streams[1]


@pytest.mark.parametrize("version", [1, 4])
def test_a_response_of_weights_that_are_too_old_or_yet_to_come_is_an_error(
    engine: EagerEngine, version: int
):
    knobs: Any = {"first_step": 3, "last_step": STEPS, "staleness_at": lambda _: 1}
    train(engine, version)
    stream = RolloutStream(engine, prompts_at, sampling_at, **knobs)
    with pytest.raises(RuntimeError, match=f"version {version}; allowed are versions 2 to 3"):
        stream.at(3)
    stream = RolloutStream(engine, prompts_at, sampling_at, **knobs, recorded=True)
    stream.at(3)
    assert stream.measures()["rollout/staleness_max"] == 3 - version
