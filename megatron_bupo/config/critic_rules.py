"""Do the settings of PPO's critic say something, and fit the rest? Its optimizer's are looked at
with the policy's, in `optimizer_rules.py`.
"""

from __future__ import annotations

import json

from megatron_bupo.config.load import flatten
from megatron_bupo.config.optimizer_rules import check_critic_optimizer_against_model
from megatron_bupo.config.parallel_rules import ModelSizes, check_parallel_against_model
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

_OF_GAE = ("algorithm.gamma", "algorithm.gae_lambda")


def check_critic(config: Config) -> None:
    """All rules that need no model."""
    if not config.has_critic:
        _nothing_of_it_is_set(config)
        return
    _the_policy_learns_too(config)
    _minibatches_divide(config)
    if config.bupo.internal_layout is not None and config.bupo.phases():
        raise InputError(
            "bupo.internal_layout with algorithm.advantage=gae",
            "the critic is a whole model under the layout of parallel, and stays there",
            "set bupo.internal_layout=null, or choose an advantage without a critic",
        )


def check_critic_against_model(config: Config, critic: ModelSizes) -> None:
    """The rules that need the critic's sizes, which may be others than the policy's."""
    check_parallel_against_model(config, critic)
    check_critic_optimizer_against_model(config, critic)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if prompt + response > critic.max_positions:
        raise InputError(
            f"data.max_prompt_tokens={prompt}, rollout.max_response_tokens={response}",
            f"together exceed the critic's {critic.max_positions} positions",
            "choose less, or a critic with more positions",
        )


def refuse_critic_of_unknown(config: Config, family: str) -> None:
    """A model that only Megatron-Bridge knows, of the architecture `family`, has no critic."""
    if config.has_critic and config.critic.path is None:
        raise InputError(
            f"algorithm.advantage=gae, model.path={config.model.path}",
            f"a critic begins with the weights of a model that we read ourselves, and {family} is "
            "opened by Megatron-Bridge",
            "name one by critic.path, or choose an advantage without a critic, such as "
            "algorithm.advantage=rloo",
        )


def _nothing_of_it_is_set(config: Config) -> None:
    default = flatten(Config())
    for key, value in flatten(config).items():
        if (key in _OF_GAE or key.startswith("critic.")) and value != default.get(key):
            shown = value if isinstance(value, str) else json.dumps(value)
            advantage = f"algorithm.advantage={config.algorithm.advantage}"
            raise InputError(
                f"{key}={shown}",
                f"does nothing with {advantage}, which has no critic",
                "set algorithm.advantage=gae, or leave it out",
            )


def _the_policy_learns_too(config: Config) -> None:
    warmup = config.critic.warmup_steps
    if warmup >= config.steps:
        raise InputError(
            f"critic.warmup_steps={warmup}",
            f"leaves the policy none of the run's {config.steps} steps to learn in",
            f"choose at most {config.steps - 1}",
        )


def _minibatches_divide(config: Config) -> None:
    prompts, minibatches = config.rollout.prompts_per_step, config.critic.minibatches
    if minibatches is not None and prompts % minibatches:
        raise InputError(
            f"critic.minibatches={minibatches}",
            f"does not divide rollout.prompts_per_step={prompts}",
            "choose a divisor of it, or null for algorithm.minibatches",
        )
