"""What is a rollout graded by? One function, or a weighted sum of terms, the first of which says
what is right.

A term that fails on a rollout counts 0 there, whatever the others say, and leaves its warning.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bupo.config.reward_rules import Term, is_url, terms_of
from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.functions import BUILT_IN, Arguments, arguments_of, resolve
from megatron_bupo.types import Grade, Prompt, Rollout

_EXAMPLE = Rollout(Prompt(0, (), "", "", {}), (), "", (), None, "stop", 0)


@dataclass(frozen=True)
class Function:
    """A reward function with its options, and what else it is called with."""

    call: Callable[..., Any]
    arguments: Arguments
    options: dict[str, Any]


def load(term: Term, max_response_tokens: int | None) -> Function:
    """Import the function of `term` and look at its options, `max_response_tokens` among them where
    it takes that and is not given it.
    """
    key = f"{term.key}.function"
    options = dict(term.options)
    function = resolve(term.function, key=key)
    if max_response_tokens is not None and _takes(function, "max_response_tokens"):
        options = {"max_response_tokens": max_response_tokens} | options
    arguments = arguments_of(function, term.function, options, key=key)
    if term.function in BUILT_IN:
        _try(function, arguments, options, term)
    return Function(function, arguments, options)


def check_terms(reward: RewardConfig, max_response_tokens: int | None) -> None:
    """Every term's function is there and takes its options."""
    from megatron_bupo.rewards.remote import RemoteGrader

    for term in terms_of(reward):
        if is_url(term.function):
            RemoteGrader(term, reward.timeout_s)
        else:
            load(term, max_response_tokens)


def composed(terms: Sequence[Term], values: Sequence[Grade]) -> Grade:
    """A rollout's grade from those of its `terms`."""
    total = math.fsum(term.weight * value.reward for term, value in zip(terms, values, strict=True))
    warnings = [
        f"{term.name}: {value.warning}"
        for term, value in zip(terms, values, strict=True)
        if value.warning
    ]
    if not math.isfinite(total):
        warnings.append(f"the sum of the terms is {total}")
        total = 0.0
    components = {term.name: value.reward for term, value in zip(terms, values, strict=True)}
    return Grade(total, "; ".join(warnings) or None, components)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _try(
    function: Callable[..., Any], arguments: Arguments, options: dict[str, Any], term: Term
) -> None:
    """Our own functions look at their options when they are called."""
    args, keywords = arguments.of(_EXAMPLE)
    try:
        value = function(*args, **keywords, **options)
        if not math.isfinite(value):
            raise ValueError(f"they make it {value}")
    except (ArithmeticError, TypeError, ValueError) as error:
        given = ", ".join(f"{k}: {v}" for k, v in options.items())
        raise InputError(
            f"{term.key}.options={{{given}}}", f"do not fit {term.function} ({error})"
        ) from None
