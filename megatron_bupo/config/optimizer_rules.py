"""Can AdamW do what `optimizer.*` asks of it on this model, and `critic.optimizer.*` on the critic?

Rules name the section that they speak of, which is all that the two differ in, and the parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from megatron_bupo.config.optimizer import OptimizerConfig
from megatron_bupo.config.parallel_rules import ModelSizes
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

POLICY_PARTS = ("embedding", "final_norm", "unembedding")  # outside the layers
CRITIC_PARTS = ("embedding", "final_norm", "value_head")
CRITIC = "critic.optimizer"


def layers_of(key: str) -> range | None:
    """The layers, counted from 1, that a key of `lr_factors` names: `7` or `1-6`.

    None for a key that is not of that form.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def check_optimizer(config: Config) -> None:
    """The rules that need no model; for the critic's where there is one."""
    _check_adamw(config.optimizer, "optimizer", POLICY_PARTS)
    if config.has_critic:
        _check_adamw(config.critic.optimizer, CRITIC, CRITIC_PARTS)


def check_optimizer_against_model(config: Config, model: ModelSizes) -> None:
    """Learning-rate factors name what the model has, and leave each phase something to train."""
    factors = config.optimizer.lr_factors
    _layers_are_the_models(factors, "optimizer", model)
    if model.tied and "unembedding" in factors:
        raise InputError(
            f"optimizer.lr_factors.unembedding={factors['unembedding']:g}",
            "the model's unembedding is its embedding (tied weights)",
            "set optimizer.lr_factors.embedding for both",
        )
    _something_is_trained(config, model)


def check_critic_optimizer_against_model(config: Config, critic: ModelSizes) -> None:
    """The same for the critic."""
    factors = config.critic.optimizer.lr_factors
    _layers_are_the_models(factors, CRITIC, critic)
    if _frozen(factors) >= {*CRITIC_PARTS, *range(1, critic.layers + 1)}:
        raise _frozen_altogether(CRITIC, factors, "critic")


def _check_adamw(optimizer: OptimizerConfig, where: str, parts: tuple[str, ...]) -> None:
    _betas_are_in_range(optimizer, where)
    _learning_rate_decays(optimizer, where)
    _factors_have_keys(optimizer.lr_factors, where, parts)
    _factors_are_in_range(optimizer.lr_factors, where)
    _layers_have_one_factor(optimizer.lr_factors, where)


def _betas_are_in_range(optimizer: OptimizerConfig, where: str) -> None:
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise InputError(
            f"{where}.betas={list(optimizer.betas)}",
            "is out of range",
            "each must be at least 0 and less than 1",
        )


def _learning_rate_decays(optimizer: OptimizerConfig, where: str) -> None:
    if optimizer.min_lr > optimizer.lr:
        raise InputError(
            f"{where}.min_lr={optimizer.min_lr}",
            f"is above {where}.lr={optimizer.lr}",
            f"choose at most {optimizer.lr}",
        )


def _factors_have_keys(factors: Mapping[str, float], where: str, parts: tuple[str, ...]) -> None:
    for key, factor in factors.items():
        layers = layers_of(key)
        if key not in parts and (layers is None or not layers or layers[0] < 1):
            raise InputError(
                f"{where}.lr_factors.{key}={factor:g}",
                f"names no part of the {'critic' if where == CRITIC else 'model'}",
                f"choose a layer (7, counted from 1), layers (1-6), {', '.join(parts)}",
            )


def _factors_are_in_range(factors: Mapping[str, float], where: str) -> None:
    for key, factor in factors.items():
        if not (factor >= 0 and math.isfinite(factor)):
            raise InputError(
                f"{where}.lr_factors.{key}={factor:g}",
                "is out of range",
                "must be at least 0 (0: frozen)",
            )


def _layers_have_one_factor(factors: Mapping[str, float], where: str) -> None:
    owner: dict[int, str] = {}
    for key in factors:
        for layer in layers_of(key) or ():
            if layer in owner:
                raise InputError(
                    f"{where}.lr_factors.{key} with {where}.lr_factors.{owner[layer]}",
                    f"give layer {layer} two factors",
                    "let the ranges not overlap",
                )
            owner[layer] = key


def _layers_are_the_models(factors: Mapping[str, float], where: str, model: ModelSizes) -> None:
    for key, factor in factors.items():
        layers = layers_of(key)
        if layers is not None and layers[-1] > model.layers:
            raise InputError(
                f"{where}.lr_factors.{key}={factor:g}",
                f"the {'critic' if where == CRITIC else 'model'} has {model.layers} layers",
                f"choose 1..{model.layers}",
            )


def _something_is_trained(config: Config, model: ModelSizes) -> None:
    """No phase's policy is frozen altogether."""
    factors, bupo = config.optimizer.lr_factors, config.bupo
    outside = {"embedding"} if model.tied else {"embedding", "unembedding"}
    phases = [(layer, bupo.read_out_norm) for layer, _ in bupo.phases()]
    for depth, has_norm in [*phases, (model.layers, True)]:
        norm = ["final_norm"] if has_norm else []
        if _frozen(factors) >= {*outside, *range(1, depth + 1), *norm}:
            policy = "full policy" if depth == model.layers else f"internal policy of layer {depth}"
            raise _frozen_altogether("optimizer", factors, policy)


def _frozen(factors: Mapping[str, float]) -> set[str | int]:
    """The parts of the model that do not learn, layers by their numbers."""
    keys = [key for key, factor in factors.items() if factor == 0]
    return {part for key in keys for part in layers_of(key) or (key,)}


def _frozen_altogether(where: str, factors: Mapping[str, float], what: str) -> InputError:
    return InputError(
        f"{where}.lr_factors={dict(factors)}",
        f"freezes all that the {what} could learn",
        "leave a part of it a factor above 0",
    )
