"""Can the optimizer do what `optimizer.*` asks of it, on this model?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from megatron_bupo.config.parallel_rules import ModelSizes
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

OUTSIDE_LAYERS = ("embedding", "final_norm", "unembedding")


def layers_of(key: str) -> range | None:
    """The layers, counted from 1, that a key of `optimizer.lr_factors` names: `7` or `1-6`.

    None for a key that is not of that form.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def check_optimizer(config: Config) -> None:
    """The rules that need no model."""
    _betas_are_in_range(config)
    _learning_rate_decays(config)
    _factors_have_keys(config.optimizer.lr_factors)
    _factors_are_in_range(config.optimizer.lr_factors)
    _layers_have_one_factor(config.optimizer.lr_factors)


def check_optimizer_against_model(config: Config, model: ModelSizes) -> None:
    """Learning-rate factors name what the model has, and leave each phase something to train."""
    factors = config.optimizer.lr_factors
    for key, factor in factors.items():
        layers = layers_of(key)
        if layers is not None and layers[-1] > model.layers:
            raise InputError(
                f"{_key(key)}={factor:g}",
                f"the model has {model.layers} layers",
                f"choose 1..{model.layers}",
            )
    if model.tied and "unembedding" in factors:
        raise InputError(
            f"{_key('unembedding')}={factors['unembedding']:g}",
            "the model's unembedding is its embedding (tied weights)",
            f"set {_key('embedding')} for both",
        )
    _something_is_trained(config, model)


def _key(key: str) -> str:
    return f"optimizer.lr_factors.{key}"


def _betas_are_in_range(config: Config) -> None:
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise InputError(
            f"optimizer.betas={list(config.optimizer.betas)}",
            "is out of range",
            "each must be at least 0 and less than 1",
        )


def _learning_rate_decays(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise InputError(
            f"optimizer.min_lr={optimizer.min_lr}",
            f"is above optimizer.lr={optimizer.lr}",
            f"choose at most {optimizer.lr}",
        )


def _factors_have_keys(factors: Mapping[str, float]) -> None:
    for key, factor in factors.items():
        layers = layers_of(key)
        if key not in OUTSIDE_LAYERS and (layers is None or not layers or layers[0] < 1):
            raise InputError(
                f"{_key(key)}={factor:g}",
                "names no part of the model",
                f"choose a layer (7, counted from 1), layers (1-6), {', '.join(OUTSIDE_LAYERS)}",
            )


def _factors_are_in_range(factors: Mapping[str, float]) -> None:
    for key, factor in factors.items():
        if not (factor >= 0 and math.isfinite(factor)):
            raise InputError(
                f"{_key(key)}={factor:g}", "is out of range", "must be at least 0 (0: frozen)"
            )


def _layers_have_one_factor(factors: Mapping[str, float]) -> None:
    owner: dict[int, str] = {}
    for key in factors:
        for layer in layers_of(key) or ():
            if layer in owner:
                raise InputError(
                    f"{_key(key)} with {_key(owner[layer])}",
                    f"give layer {layer} two factors",
                    "let the ranges not overlap",
                )
            owner[layer] = key


def _something_is_trained(config: Config, model: ModelSizes) -> None:
    """No phase's policy is frozen altogether."""
    factors, bupo = config.optimizer.lr_factors, config.bupo
    keys = [key for key, factor in factors.items() if factor == 0]
    frozen = {part for key in keys for part in layers_of(key) or (key,)}
    outside = {"embedding"} if model.tied else {"embedding", "unembedding"}
    phases = [(layer, bupo.read_out_norm) for layer, _ in bupo.phases()]
    for depth, has_norm in [*phases, (model.layers, True)]:
        if frozen >= {*outside, *range(1, depth + 1), *(["final_norm"] if has_norm else [])}:
            policy = "full policy" if depth == model.layers else f"internal policy of layer {depth}"
            raise InputError(
                f"optimizer.lr_factors={dict(factors)}",
                f"freezes all that the {policy} could learn",
                "leave a part of it a factor above 0",
            )
