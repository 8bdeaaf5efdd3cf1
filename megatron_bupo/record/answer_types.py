"""What kind of answer does a question have? Rewards are told apart by it, because a policy that
always answers "Yes" is right about many questions of the kind and about no other: `reward_mean`
alone does not show that.
"""

from __future__ import annotations

import re

# The first pattern that fits the whole answer names its type.
_TYPES = (
    ("integer", r"[+-]?[0-9]+(?:,[0-9]{3})*"),
    ("number", r"[+-]?(?:[0-9]*\.[0-9]+|[0-9]+/[0-9]+|\\frac\{?[0-9]+\}?\{?[0-9]+\}?)|[0-9.]+%"),
    ("yes_no", r"(?i:yes|no|true|false)"),
    ("choice", r"\(?[A-E]\)?"),
    ("text", r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*"),
    ("expression", r"(?s:.*)"),
)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _TYPES)


def answer_type(answer: str) -> str:
    """integer, number, yes_no, choice, text or expression."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace("\\%", "%"))
    text = re.sub(r"\\\$|\$|\\!", "", text).strip(" .")
    return next(name for name, pattern in _PATTERNS if pattern.fullmatch(text))
