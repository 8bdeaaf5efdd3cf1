from __future__ import annotations

import pytest

from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.critic_rules import check_critic_against_model, refuse_critic_of_unknown
from megatron_bupo.errors import InputError
from tests.config.test_algorithm_rules import config_with
from tests.config.test_optimizer_rules import Sizes

GAE = "algorithm.advantage=gae"
FACTORS = "critic.optimizer.lr_factors"
INTERNAL = "bupo.target_layer=2 bupo.internal_steps=3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "critic.path=model",
            (
                "critic.path=model: does nothing with algorithm.advantage=grpo, which has no "
                "critic; set algorithm.advantage=gae, or leave it out"
            ),
        ),
        ("critic.clip_range=null", "critic.clip_range=null: does nothing with algorithm.advantage"),
        ("critic.optimizer.lr=1e-6", "critic.optimizer.lr=1e-06: does nothing with algorithm."),
        (
            f"{FACTORS}={{value_head:10}}",
            f"{FACTORS}.value_head=10.0: does nothing with algorithm.",
        ),
        (
            "algorithm.gamma=0.99 algorithm.advantage=reinforce_plus_plus",
            "algorithm.gamma=0.99: does nothing with algorithm.advantage=reinforce_plus_plus, ",
        ),
        ("algorithm.gae_lambda=0.95", "algorithm.gae_lambda=0.95: does nothing with algorithm."),
        (
            f"{GAE} critic.warmup_steps=5 steps=5",
            (
                "critic.warmup_steps=5: leaves the policy none of the run's 5 steps to learn in; "
                "choose at most 4"
            ),
        ),
        (
            f"{GAE} critic.minibatches=3 rollout.prompts_per_step=16",
            (
                "critic.minibatches=3: does not divide rollout.prompts_per_step=16; choose a "
                "divisor of it, or null for algorithm.minibatches"
            ),
        ),
        (
            f"{GAE} bupo.internal_layout.dp=1 {INTERNAL}",
            "bupo.internal_layout with algorithm.advantage=gae: the critic is a whole model ",
        ),
        (
            f"{GAE} critic.optimizer.betas=[0.9,1]",
            "critic.optimizer.betas=[0.9, 1.0]: is out of range; each must be at least 0 and less",
        ),
        (
            f"{GAE} critic.optimizer.min_lr=1e-4",
            "critic.optimizer.min_lr=0.0001: is above critic.optimizer.lr=1e-05; choose at most",
        ),
        (
            f"{GAE} {FACTORS}={{unembedding:0}}",
            (
                f"{FACTORS}.unembedding=0: names no part of the critic; choose a layer (7, counted "
                "from 1), layers (1-6), embedding, final_norm, value_head"
            ),
        ),
        (
            f"{GAE} optimizer.lr_factors={{value_head:0}}",
            "optimizer.lr_factors.value_head=0: names no part of the model; choose a layer (7, ",
        ),
        (
            f"{GAE} critic.optimizer.lr=-1",
            "critic.optimizer.lr=-1.0: is out of range; must be at least 0",
        ),
        (f"{GAE} algorithm.gamma=1.1", "algorithm.gamma=1.1: is out of range; must be between 0"),
    ],
)
def test_settings_of_a_critic_that_mean_nothing_are_refused_with_a_way_out(
    words: str, message: str
):
    with pytest.raises(InputError) as error:
        check(config_with(*words.split()), None)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "critic.warmup_steps=5 critic.minibatches=8 critic.clip_range=null",
        f"algorithm.gamma=0.99 algorithm.gae_lambda=0 algorithm.normalize_by_std=false {INTERNAL}",
        f"{FACTORS}={{value_head:10,1-6:0}} rollout.responses_per_prompt=1",
        "bupo.internal_layout.dp=1",  # without an internal phase
        "algorithm.kl_coefficient=0.1 algorithm.kl_in=reward algorithm.kl_estimator=k1",
    ],
)
def test_what_a_critic_can_do_is_allowed(words: str):
    config = config_with(GAE, *words.split())
    check(config, None)
    check_against_model(config, Sizes())
    check_critic_against_model(config, Sizes())


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ("{13: 2}", f"{FACTORS}.13=2: the critic has 12 layers; choose 1..12"),
        (
            "{1-12:0,embedding:0,final_norm:0,value_head:0}",
            f"{FACTORS}={{'1-12': 0.0, 'embedding': 0.0, 'final_norm': 0.0, 'value_head': 0.0}}: ",
        ),
    ],
)
def test_its_rates_are_those_of_parts_that_it_has(factors: str, message: str):
    with pytest.raises(InputError) as error:
        check_critic_against_model(config_with(GAE, f"{FACTORS}={factors}"), Sizes())
    assert str(error.value).startswith(message)


def test_a_model_that_only_the_bridge_knows_has_no_critic():
    refuse_critic_of_unknown(config_with(), "OlmoForCausalLM")
    with pytest.raises(InputError, match="and OlmoForCausalLM is opened by Megatron-Bridge"):
        refuse_critic_of_unknown(config_with(GAE), "OlmoForCausalLM")
