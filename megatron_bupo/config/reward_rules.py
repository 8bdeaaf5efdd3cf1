"""Which terms is a reward made of, and do their settings make sense? What needs no import of them;
`rewards/terms.py` looks at the functions themselves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_bupo.config.questions import RewardConfig
from megatron_bupo.errors import InputError

_NAME = re.compile(r"(?!answers_)[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Term:
    """One term of a reward, and the config key that it comes from."""

    key: str  # reward, or reward.terms[i]
    function: str
    options: dict[str, Any]
    weight: float
    name: str  # in metrics

    @property
    def where(self) -> str:
        """The key and value to name in an error."""
        return f"{self.key}.function={self.function}"


def is_url(function: str) -> bool:
    """Is it a remote grader?"""
    return function.startswith(("http://", "https://"))


def terms_of(reward: RewardConfig) -> tuple[Term, ...]:
    """The terms whose weighted sum is the reward; the first one says what is right."""
    if not reward.terms:
        name = _default_name(reward.function)
        return (Term("reward", reward.function, dict(reward.options), 1.0, name),)
    return tuple(
        Term(
            f"reward.terms[{i}]",
            term.function,
            dict(term.options),
            term.weight,
            term.name or _default_name(term.function),
        )
        for i, term in enumerate(reward.terms)
    )


def check_reward(reward: RewardConfig) -> None:
    """All rules about how responses are graded that need no function."""
    if reward.terms and (reward.function != RewardConfig.function or reward.options):
        raise InputError(
            f"reward.terms with reward.function={reward.function}",
            "are two descriptions of one reward",
            "name the function as the first term, the one that says what is right",
        )
    terms = terms_of(reward)
    for term in terms:
        if is_url(term.function):
            _check_url(term)
        if not math.isfinite(term.weight):
            raise InputError(f"{term.key}.weight={term.weight}", "is not a finite number")
        if reward.terms and not _NAME.fullmatch(term.name):
            raise InputError(
                f"{term.key}.name={term.name}",
                "would make a metric reward/NAME_mean that cannot be told from others",
                "choose letters, digits and underscores, not beginning with answers_",
            )
    [(name, count)] = Counter(term.name for term in terms).most_common(1)
    if count > 1:
        raise InputError(
            f"reward.terms: {count} terms are called {name}",
            "each is logged under its name",
            "set reward.terms[i].name",
        )


def _default_name(function: str) -> str:
    if is_url(function):
        host, _, path = function.partition("://")[2].partition("/")
        return re.sub(r"\W+", "_", path.strip("/") or host)
    return function.rpartition(":")[2].rpartition(".")[2] or function


def _check_url(term: Term) -> None:
    where, way_out = term.where, "write http://HOST:PORT/PATH"
    try:
        parts = urlsplit(term.function)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(where, f"is no address ({error})", way_out) from None
    if not host or any(c.isspace() for c in term.function):
        raise InputError(where, "is no address", way_out)
    if parts.password:
        raise InputError(
            where.replace(f":{parts.password}@", ":***@"),
            "has a password in it, which would be logged",
            "use options.headers with a $VARIABLE",
        )
