"""Can rollouts be generated like this, and learned from?

Rollouts that are generated ahead come from older weights than those that learn. In the full-policy
phase the two differ by their weights alone, and truncated importance sampling accounts for that
(algorithm/rollout_correction.py). In the internal phase sampler and learner are two policies in
the first place: BuPO has no weight between them, and we make none up.
"""

from __future__ import annotations

import json

from megatron_bupo.config.parallel_rules import ModelSizes
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

_SERVERS_ONLY = ("max_staleness", "colocated", "step_budget_s", "step_budget_tokens")


def check_rollout(config: Config) -> None:
    """All rules about how responses are generated."""
    _the_engine_can_do_it(config)
    _nothing_is_generated_ahead_without_need(config)
    _the_internal_phase_is_on_policy(config)
    _importance_weights_are_defined(config)
    _there_is_a_full_policy_to_compare(config)


def doubts(config: Config) -> list[str]:
    """What to tell the person who starts the run; warnings with the way out."""
    rollout, phases, told = config.rollout, config.bupo.phases(), []
    if rollout.max_staleness and not config.corrects_rollouts:
        told.append(
            f"warning: rollout.max_staleness={rollout.max_staleness} with "
            "algorithm.rollout_correction=none learns from responses of older weights as if they "
            "were of the present ones; set algorithm.rollout_correction=auto"
        )
    if config.corrects_rollouts and rollout.top_p < 1:
        told.append(
            f"warning: rollout.top_p={rollout.top_p} draws what it keeps up to 1/top_p="
            f"{1 / rollout.top_p:.3g} times as often as the sampler's log-probs say, which are of "
            "the whole distribution, and truncated importance sampling does not account for that; "
            "set rollout.top_p=1"
        )
    if config.corrects_rollouts and config.algorithm.rollout_correction == "auto" and phases:
        told.append(
            "note: truncated importance sampling weighs the tokens of full-policy steps alone; in "
            "an internal phase sampler and learner are two policies, and no such weight is defined"
        )
    return told


def check_sequences(config: Config, model: ModelSizes) -> None:
    """Prompts and responses, of whatever purpose, are no longer than the model can read."""
    room, whose = positions(config, model)
    prompt, asked = config.data.max_prompt_tokens, {"rollout": config.rollout.max_response_tokens}
    if config.evaluation.every:
        asked["evaluation"] = config.evaluation.max_response_tokens or 0
    if config.probe.every:
        asked["probe"] = config.probe.max_response_tokens or 0
    for section, response in asked.items():
        if prompt + response > room:
            raise InputError(
                f"data.max_prompt_tokens={prompt}, {section}.max_response_tokens={response}",
                f"together exceed {whose}",
                f"choose {section}.max_response_tokens={room - prompt}"
                if prompt < room
                else f"choose data.max_prompt_tokens < {room}",
            )


def positions(config: Config, model: ModelSizes) -> tuple[int, str]:
    """How many tokens a prompt and its response may have together, and in words why."""
    room = model.max_positions
    if config.rollout.engine == "sglang":  # see rollout/client.py
        return room - 2, f"the model's {room} positions, of which SGLang keeps 2 free"
    return room, f"the model's {room} positions"


def _the_engine_can_do_it(config: Config) -> None:
    engine = config.rollout.engine
    for name in _SERVERS_ONLY if engine != "sglang" else ():
        value = getattr(config.rollout, name)
        if value:
            raise InputError(
                f"rollout.{name}={json.dumps(value)}",
                f"is for servers, and rollout.engine={engine} generates in the trainer's own "
                "processes",
                f"set rollout.engine=sglang, or leave rollout.{name} out",
            )


def _nothing_is_generated_ahead_without_need(config: Config) -> None:
    if config.rollout.max_staleness and config.debug.replay is not None:
        raise InputError(
            f"rollout.max_staleness={config.rollout.max_staleness}, "
            f"debug.replay={config.debug.replay}",
            "responses from files need not be generated ahead",
            "leave rollout.max_staleness out; algorithm.rollout_correction=tis_full weighs their "
            "tokens as then",
        )


def _the_internal_phase_is_on_policy(config: Config) -> None:
    rollout = config.rollout
    if rollout.max_staleness and config.bupo.phases() and rollout.overlap_phases == "all":
        raise InputError(
            f"rollout.max_staleness={rollout.max_staleness} with an internal phase",
            "there the sampler's and the learner's log-probs are of two policies, so no importance "
            "weight is defined for stale responses",
            "set rollout.overlap_phases=full to generate ahead in the full-policy phase only, or "
            "rollout.max_staleness=0",
        )


def _importance_weights_are_defined(config: Config) -> None:
    if config.algorithm.rollout_correction == "tis" and config.bupo.phases():
        raise InputError(
            "algorithm.rollout_correction=tis with an internal phase",
            "there the sampler's and the learner's log-probs are of two policies, so no importance "
            "weight is defined",
            "set algorithm.rollout_correction=tis_full to weigh the tokens of full-policy steps "
            "alone, or auto, which does that where rollout.max_staleness > 0",
        )


def _there_is_a_full_policy_to_compare(config: Config) -> None:
    every, bupo = config.debug.mismatch_every, config.bupo
    if every and bupo.internal_layout is not None and bupo.phases():
        raise InputError(
            f"debug.mismatch_every={every} with bupo.internal_layout",
            "an actor with the layers of the internal phase alone has no full policy to compare "
            "with the sampler",
            "leave one of the two out",
        )
