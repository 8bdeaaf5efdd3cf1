from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.algorithm_rules import doubts
from megatron_bupo.config.checks import CHOICES, check
from megatron_bupo.config.schema import AlgorithmConfig, Config
from megatron_bupo.errors import InputError


def config_with(*overrides: str) -> Config:
    return load_config(None, ["model.path=model", "data.train=train.jsonl", *overrides])


@pytest.mark.parametrize(
    ("advantage", "loss"),
    list(itertools.product(CHOICES["algorithm.advantage"], CHOICES["algorithm.loss"])),
)
def test_every_advantage_composes_with_every_loss_aggregation_and_phase(advantage: str, loss: str):
    words = [f"algorithm.advantage={advantage}", f"algorithm.loss={loss}"]
    plain = config_with(*words, "bupo.target_layer=2", "bupo.internal_steps=3")
    for aggregation in CHOICES["algorithm.loss_aggregation"]:
        algorithm = replace(plain.algorithm, loss_aggregation=aggregation)
        config = replace(plain, algorithm=algorithm)
        if advantage == "dr_grpo" and aggregation in {"token_mean", "sequence_mean"}:
            with pytest.raises(InputError, match=r"Dr\. GRPO divides neither"):
                check(config, None)
        else:
            check(config, None)


@pytest.mark.parametrize(
    ("words", "aggregation"),
    [
        ("", "token_mean"),
        ("algorithm.advantage=dr_grpo", "constant_length"),
        ("algorithm.loss=gspo", "sequence_mean"),
        ("algorithm.loss=cispo", "token_mean"),
        ("algorithm.loss=gspo algorithm.advantage=dr_grpo", "constant_length"),
        ("algorithm.loss=gspo algorithm.loss_aggregation=token_mean", "token_mean"),
    ],
)
def test_auto_is_the_aggregation_of_the_method(words: str, aggregation: str):
    assert config_with(*words.split()).algorithm.aggregation == aggregation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "rollout.responses_per_prompt=1",
            (
                "rollout.responses_per_prompt=1: grpo compares the responses to one prompt with "
                "each other; choose at least 2, or algorithm.advantage=reinforce_plus_plus"
            ),
        ),
        (
            "rollout.responses_per_prompt=1 algorithm.advantage=reinforce_plus_plus_baseline",
            "rollout.responses_per_prompt=1: reinforce_plus_plus_baseline compares the responses",
        ),
        (
            (
                "rollout.responses_per_prompt=1 algorithm.advantage=reinforce_plus_plus "
                "rollout.prompts_per_step=1 algorithm.minibatches=1"
            ),
            (
                "rollout.responses_per_prompt=1, rollout.prompts_per_step=1: reinforce_plus_plus "
                "compares the responses of a step with each other; choose at least 2 of either"
            ),
        ),
        (
            "algorithm.loss=cispo algorithm.dual_clip=3",
            (
                "algorithm.dual_clip=3.0: says nothing with algorithm.loss=cispo; leave it out, or "
                "set algorithm.loss=clipped"
            ),
        ),
        (
            "algorithm.loss=unclipped algorithm.clip_high=0.28",
            "algorithm.clip_high=0.28: says nothing with algorithm.loss=unclipped; leave it out",
        ),
        (
            "algorithm.advantage=dr_grpo algorithm.loss_aggregation=token_mean",
            (
                "algorithm.loss_aggregation=token_mean with algorithm.advantage=dr_grpo: Dr. GRPO "
                "divides neither the advantage by the standard deviation nor the loss by a "
                "response's length; set algorithm.loss_aggregation=auto; or, for the "
                "advantage alone, algorithm.advantage=grpo algorithm.normalize_by_std=false"
            ),
        ),
        (
            "algorithm.advantage=reinforce_plus_plus algorithm.normalize_by_std=false",
            "algorithm.normalize_by_std=false with algorithm.advantage=reinforce_plus_plus: its",
        ),
        (
            "rollout.dynamic_sampling_rounds=2 algorithm.advantage=reinforce_plus_plus",
            "rollout.dynamic_sampling_rounds=2 with algorithm.advantage=reinforce_plus_plus: ",
        ),
        (
            "rollout.dynamic_sampling_rounds=2 algorithm.advantage=gae",
            (
                "rollout.dynamic_sampling_rounds=2 with algorithm.advantage=gae: responses are "
                "compared with what the critic expected, so a group whose rewards are all equal "
            ),
        ),
        (
            "rollout.dynamic_sampling_rounds=2 debug.replay=/run",
            (
                "rollout.dynamic_sampling_rounds=2, debug.replay=/run: nothing further can be "
                "asked of files, which hold the groups that were kept; set "
                "rollout.dynamic_sampling_rounds=0"
            ),
        ),
        (
            "rollout.dynamic_sampling_rounds=-1",
            "rollout.dynamic_sampling_rounds=-1: is out of range; must be at least 0",
        ),
        (
            "algorithm.entropy_coefficient=-1",
            "algorithm.entropy_coefficient=-1.0: is out of range; must be at least 0",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_a_way_out(words: str, message: str):
    with pytest.raises(InputError) as error:
        check(config_with(*words.split()), None)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("advantage", ["reinforce_plus_plus", "gae"])
def test_what_is_not_compared_within_a_group_needs_none(advantage: str):
    words = [f"algorithm.advantage={advantage}", "rollout.responses_per_prompt=1"]
    check(config_with(*words), None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", []),
        ("algorithm.loss=unclipped", []),
        ("algorithm.loss=gspo", ["warning: algorithm.loss=gspo with algorithm.clip_low=0.2, "]),
        ("algorithm.loss=gspo algorithm.clip_low=3e-4 algorithm.clip_high=4e-4", []),
        (
            "algorithm.loss=gspo algorithm.clip_low=3e-4 algorithm.loss_aggregation=token_mean",
            ["warning: algorithm.loss=gspo with algorithm.loss_aggregation=token_mean "],
        ),
        ("algorithm.loss=cispo", ["note: algorithm.loss=cispo with algorithm.clip_low=0.2 also "]),
        ("algorithm.loss=cispo algorithm.clip_low=1", []),
        (
            "algorithm.loss=cispo algorithm.minibatches=1",
            ["note: with algorithm.minibatches=1 the ratio is 1, and algorithm.loss=cispo has the"],
        ),
    ],
)
def test_a_loss_that_is_perhaps_not_meant_is_told_of(words: str, told: list[str]):
    said = doubts(config_with(*words.split()))
    assert len(said) == len(told)
    assert all(text.startswith(start) for text, start in zip(said, told, strict=True))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_an_estimator_that_does_not_restrain_where_it_stands_is_told_of(estimator: str, place: str):
    without, kl = (
        Config(algorithm=AlgorithmConfig(kl_coefficient=c, kl_estimator=estimator, kl_in=place))
        for c in (0.0, 0.1)
    )
    told = doubts(kl)
    if (estimator, place) in {("k2", "loss"), ("k3", "loss"), ("k1", "reward")}:
        assert told == []
    else:
        [text] = told
        assert text.startswith(f"warning: algorithm.kl_estimator={estimator} in the {place} ")
    assert doubts(without) == []
