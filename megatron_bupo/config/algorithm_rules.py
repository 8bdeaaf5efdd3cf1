"""Which settings of the algorithm say nothing beside each other, or do not do what they seem to?

What contradicts itself is refused; what runs, but is perhaps not meant, is told. A setting at its
default is nobody's word, so it may stand where it says nothing.
"""

from __future__ import annotations

import json

from megatron_bupo.config.schema import AlgorithmConfig, Config
from megatron_bupo.errors import InputError

# algorithm/kl.py says why; on the demo's bed each shows within a dozen steps.
_KL_DOUBTS = {
    ("k1", "loss"): "does not restrain the policy (its gradient is zero on average)",
    ("k2", "reward"): "drives the policy away from the reference",
    ("k3", "reward"): "drives the policy away from the reference",
}
_BY_STEP = ("reinforce_plus_plus", "gae")  # not by group: one response to a prompt will do
_WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
_UNREAD = {"cispo": ("dual_clip",), "unclipped": ("clip_low", "clip_high", "dual_clip")}
_LARGE_FOR_A_MEAN = 0.05  # a hundred times GSPO's own


def check_algorithm(config: Config) -> None:
    """All rules about advantages and losses."""
    _responses_can_be_compared(config)
    _the_loss_reads_its_settings(config.algorithm)
    _dr_grpo_is_both_halves(config.algorithm)
    _whitening_divides(config.algorithm)
    _groups_can_lack_a_signal(config)


def doubts(config: Config) -> list[str]:
    """What to tell the person who starts the run; each with the way out."""
    return [*_kl_doubts(config.algorithm), *_loss_doubts(config.algorithm)]


def _responses_can_be_compared(config: Config) -> None:
    rollout, advantage = config.rollout, config.algorithm.advantage
    where = f"rollout.responses_per_prompt={rollout.responses_per_prompt}"
    if rollout.responses_per_prompt >= 2:
        return
    if advantage not in _BY_STEP:
        raise InputError(
            where,
            f"{advantage} compares the responses to one prompt with each other",
            "choose at least 2, or algorithm.advantage=reinforce_plus_plus, which compares those "
            "of a step",
        )
    if advantage != "gae" and rollout.prompts_per_step < 2:
        raise InputError(
            f"{where}, rollout.prompts_per_step={rollout.prompts_per_step}",
            f"{advantage} compares the responses of a step with each other",
            "choose at least 2 of either",
        )


def _the_loss_reads_its_settings(algorithm: AlgorithmConfig) -> None:
    defaults = AlgorithmConfig()
    for name in _UNREAD.get(algorithm.loss, ()):
        value, default = getattr(algorithm, name), getattr(defaults, name)
        if value not in (default, None):
            raise InputError(
                f"algorithm.{name}={json.dumps(value)}",
                f"says nothing with algorithm.loss={algorithm.loss}",
                "leave it out, or set algorithm.loss=clipped",
            )


def _dr_grpo_is_both_halves(algorithm: AlgorithmConfig) -> None:
    if algorithm.advantage == "dr_grpo" and algorithm.aggregation != "constant_length":
        raise InputError(
            f"algorithm.loss_aggregation={algorithm.loss_aggregation} with "
            "algorithm.advantage=dr_grpo",
            "Dr. GRPO divides neither the advantage by the standard deviation nor the loss by a "
            "response's length",
            "set algorithm.loss_aggregation=auto; or, for the advantage alone, "
            "algorithm.advantage=grpo algorithm.normalize_by_std=false",
        )


def _whitening_divides(algorithm: AlgorithmConfig) -> None:
    if algorithm.advantage in _WHITENED and not algorithm.normalize_by_std:
        raise InputError(
            f"algorithm.normalize_by_std=false with algorithm.advantage={algorithm.advantage}",
            "its advantages are divided by the standard deviation of a step's tokens by definition",
            "leave algorithm.normalize_by_std out, or set algorithm.advantage=dr_grpo or rloo",
        )


def _groups_can_lack_a_signal(config: Config) -> None:
    rounds, advantage = config.rollout.dynamic_sampling_rounds, config.algorithm.advantage
    if not rounds:
        return
    where = f"rollout.dynamic_sampling_rounds={rounds}"
    if advantage in _BY_STEP:
        others = "all of a step" if advantage != "gae" else "what the critic expected"
        raise InputError(
            f"{where} with algorithm.advantage={advantage}",
            f"responses are compared with {others}, so a group whose rewards are all equal has a "
            "signal too",
            "set rollout.dynamic_sampling_rounds=0, or "
            "algorithm.advantage=reinforce_plus_plus_baseline",
        )
    if config.debug.replay is not None:
        raise InputError(
            f"{where}, debug.replay={config.debug.replay}",
            "nothing further can be asked of files, which hold the groups that were kept",
            "set rollout.dynamic_sampling_rounds=0",
        )


def _kl_doubts(algorithm: AlgorithmConfig) -> list[str]:
    doubt = _KL_DOUBTS.get((algorithm.kl_estimator, algorithm.kl_in))
    if not algorithm.kl_coefficient or doubt is None:
        return []
    where = f"algorithm.kl_estimator={algorithm.kl_estimator} in the {algorithm.kl_in}"
    return [f"warning: {where} {doubt}; use k1 in the reward, k2 or k3 in the loss"]


def _loss_doubts(algorithm: AlgorithmConfig) -> list[str]:
    loss, told = algorithm.loss, []
    if loss != "clipped" and algorithm.minibatches == 1:
        same = f"algorithm.loss={loss} has the gradient that clipped has"
        return [f"note: with algorithm.minibatches=1 the ratio is 1, and {same}"]
    if loss == "gspo" and algorithm.clip_low > _LARGE_FOR_A_MEAN:
        told.append(
            f"warning: algorithm.loss=gspo with algorithm.clip_low={algorithm.clip_low}, "
            f"clip_high={algorithm.clip_high} clips hardly ever: its ratio is a mean over the "
            "response; its authors' are algorithm.clip_low=3e-4 algorithm.clip_high=4e-4"
        )
    if loss == "gspo" and algorithm.aggregation == "token_mean":
        told.append(
            "warning: algorithm.loss=gspo with algorithm.loss_aggregation=token_mean weighs a "
            "response by its length, GSPO does not; set algorithm.loss_aggregation=sequence_mean"
        )
    if loss == "cispo" and algorithm.clip_low < 1:
        told.append(
            f"note: algorithm.loss=cispo with algorithm.clip_low={algorithm.clip_low} also lifts "
            "the weight of tokens that have become rare; its authors' runs have no lower bound, "
            "which is algorithm.clip_low=1"
        )
    return told
