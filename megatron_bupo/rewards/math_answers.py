r"""Is the last `\boxed{...}` of a response the right answer? No box gets 0; otherwise two rules.

`math` asks whether the two answers mean the same (math-verify, on sympy). `exact_match` is the rule
of the BuPO authors' runs: equal strings after the normalisation that came with the MATH data set
(Hendrycks et al., arXiv 2103.03874). Theirs has a quirk that ours has not: one `\boxed ` with a
space makes it overlook every `\boxed{...}`.

Both are plain functions without a time limit: sympy can be sent to sleep by an answer such as
`9^{9^{9^9}}`, so `grader.py` runs them in a process that can be killed.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

# math-verify's own time limit is a SIGALRM, which would undo the worker's; without one it warns.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")

# Hendrycks normalisation: what is replaced before and after the unit on the right is cut off.
_BEFORE_UNIT = (
    ("\n", ""),
    (r"\!", ""),
    (r"\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)
_AFTER_UNIT = ((r"\%", ""), (" .", " 0."), ("{.", "{0."))


def math(response: str, answer: str) -> float:
    """1.0 where the last box means the same as `answer`, else 0.0."""
    boxed = last_boxed(response)
    return float(boxed is not None and _equivalent(boxed, answer))


def exact_match(response: str, answer: str) -> float:
    """1.0 where the last box is `answer` after normalisation of both, else 0.0."""
    boxed = last_boxed(response)
    return float(boxed is not None and normalize(boxed) == normalize(answer))


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, or, where there is none, in the last `\fbox{...}`.

    None where that is not closed. Without braces (`\boxed 5`) it is what follows up to white space
    or a dollar sign.
    """
    for command in ("boxed", "fbox"):
        commands = list(re.finditer(rf"\\{command}(?![A-Za-z])\s*", text))
        if commands:
            return _argument(text, commands[-1].end())
    return None


def _argument(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        bare = re.split(r"[\s$]", text[start:], maxsplit=1)[0]
        return bare.rstrip(".,;:") or None
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # `\{` is no brace
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return text[start + 1 : brace.start()]
    return None


def normalize(answer: str) -> str:
    """The answer as a string that equal answers of the MATH data set share."""
    for old, new in _BEFORE_UNIT:
        answer = answer.replace(old, new)
    answer = answer.partition(r"\text{ ")[0]
    for old, new in _AFTER_UNIT:
        answer = answer.replace(old, new)
    if answer.startswith("."):
        answer = f"0{answer}"
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # `x = 5`
        answer = value
    answer = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", answer).replace(" ", "")
    answer = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\frac([^{]){", r"\\frac{\1}{", answer)
    if answer == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"\A(-?[0-9]+)/(-?[0-9]+)\Z", r"\\frac{\1}{\2}", answer)


# The responses of a group share few answers, and a prompt comes back in every epoch.
@lru_cache(maxsize=100_000)
def _equivalent(boxed: str, answer: str) -> bool:
    answer = last_boxed(answer) or answer  # a whole worked solution will do
    mine, gold = normalize(boxed), normalize(answer)
    if mine and mine == gold:
        return True
    if _INTEGER.fullmatch(mine) and _INTEGER.fullmatch(gold):  # spares most data the parser
        return int(mine) == int(gold)
    return verify(_parsed_gold(answer), _parsed(boxed), timeout_seconds=None)


@lru_cache(maxsize=100_000)
def _parsed_gold(answer: str) -> list[Any]:
    return _parsed(answer)


def _parsed(answer: str) -> list[Any]:
    # math-verify finds formulas by their dollar signs, and inline ones on one line only
    line = answer.replace("\n", " ").strip()
    if line.startswith("$"):
        line = line.strip("$")
    return parse(f"${line}$", parsing_timeout=0)
