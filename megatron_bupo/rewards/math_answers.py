r"""Does the last `\boxed{...}` of a response mean the same as the reference? No box gets 0.

math-verify compares, on sympy. What it gets wrong and reinforcement learning would find out, is
decided before it is asked:

- a reference that is a word is compared as a word, without regard to case (to math-verify `listen`
  is `silent`, a product of letters, and `Yes.` is not `Yes`);
- an answer that is still to be worked out (an integral, a sum, a limit that the reference does not
  have) is none: else asking the question back would be the answer;
- only formulas are read, not the last number in a text (else 2 is $2^{\aleph_0}$);
- repeating decimals are read as such (else `0.\overline{3}` is 0), and numbers in two different
  bases differ;
- an answer of more than `LONGEST` characters, or of numbers too large to be worked out, is wrong
  unless it is the reference to the letter.

What remains is math-verify's: percent signs and units do not count (5\% is 5 and 0.05; 5\text{ m}
is 5\text{ km}), decimals count to six places, `(1,2)` is a point, an open interval and the list
`1,2` in that order, a list is a set (`5,5` is `5`), the value of `x=5` is 5, and 90^\circ is 90.

These are plain functions without a time limit: `grader.py` runs them in a process with one.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from megatron_bupo.rewards.boxes import last_boxed
from megatron_bupo.rewards.magnitude import TooLarge, check_size

# math-verify's own time limit is a SIGALRM, which would undo the worker's; without one it warns.
logging.getLogger("math_verify").setLevel(logging.ERROR)
_log = logging.getLogger(__name__)

LONGEST = 1000  # characters of an answer that is parsed

_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?:[A-Z][a-z]+|[A-Z]{3,}|[a-z]{4,}|yes|no)(?: [A-Za-z]+)*")
_WORD_IN_TEXT = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_IN_BASE = re.compile(r"[0-9A-Za-z]+_(?:\{([0-9]+)\}|([0-9]+))")
_ALTERNATIVES = re.compile(r"[0-9]|\b(?:or|not)\b")
_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)

_TIDY = (
    (re.compile(r"[\u2010-\u2015\u2212]"), "-"),
    (re.compile(r"[\s~]+"), " "),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\displaystyle|\\!"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"(?<=[0-9])(?:\\[,;: ]|\{,\}| )(?=[0-9]{3}(?![0-9]))"), ""),  # 1\,000
    (re.compile(r"^(-?[0-9]+) ([0-9]+)/([0-9]+)$"), r"\1\\frac{\2}{\3}"),  # 1 1/2
    (re.compile(r"(?<=\W) | (?=\W)"), ""),
    # A unit at the end, and no more than one: `5\text{ or }6` and `5\text{ or 6}` stay
    (
        re.compile(r"(?<=[0-9)}i])\\(?:text|mbox|mathrm)\{[A-Za-z.]+( [a-z]+)*\}(\^\{?[23]\}?)?$"),
        "",
    ),
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")


def math(response: str, answer: str) -> float:
    """1.0 where the last box means the same as `answer`, else 0.0."""
    boxed = last_boxed(response)
    return float(boxed is not None and _same(boxed, last_boxed(answer) or answer))


def only_a_string(response: str, answer: str) -> bool:  # noqa: ARG001 - as all reward functions
    """Is the reference answer no number, word or formula? For tools/check_rewards.py."""
    gold = tidy(last_boxed(answer) or answer)
    if _INTEGER.fullmatch(gold) or _word(gold) is not None:
        return False
    return len(gold) > LONGEST or not _has_formula(_parsed(gold))


def tidy(answer: str) -> str:
    """The answer without what is only typesetting."""
    answer = answer.strip()
    if answer.startswith("$"):
        answer = answer.strip("$")
    if len(answer) > LONGEST:
        return answer
    for pattern, new in _TIDY:
        answer = pattern.sub(new, answer)
    return _REPEATING.sub(_fraction, answer.strip().rstrip(".,;: "))


def _fraction(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    numerator = int(whole + once + again) - int(f"0{whole}{once}")
    return rf"\frac{{{numerator}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


_unreadable: list[str] = []  # the first reference answer that is only a string, which the log has
_given_up: set[tuple[str, str]] = set()  # answers that the process was interrupted at


# The responses of a group share few answers, and a prompt comes back in every epoch.
@lru_cache(maxsize=100_000)
def _same(boxed: str, answer: str) -> bool:
    mine, gold = tidy(boxed), tidy(answer)
    if mine == gold or not (mine and gold):
        return bool(mine)
    if len(mine) > LONGEST or len(gold) > LONGEST:
        return False
    if _INTEGER.fullmatch(mine) and _INTEGER.fullmatch(gold):  # spares most data the parser
        return int(mine) == int(gold)
    if (word := _word(gold)) is not None:
        return _unwrapped(mine).casefold() == word.casefold()
    if not (_bases_agree(mine, gold) and _texts_agree(mine, gold)):
        return False
    if (mine, gold) in _given_up:
        raise TooLarge("the same answer has been given up before")
    _given_up.add((mine, gold))  # crossed out only if we come back, whatever may interrupt us
    same = _verified(mine, gold)
    _given_up.discard((mine, gold))
    return same


def _unwrapped(answer: str) -> str:
    text = _TEXT.fullmatch(answer)
    return (text[1] if text else answer).strip(" .,;:!")


def _word(answer: str) -> str | None:
    """The word that `answer` is; None: it is a formula."""
    plain = _unwrapped(answer)
    pattern = _WORD if plain == answer else _WORD_IN_TEXT
    return plain if pattern.fullmatch(plain) else None


def _bases_agree(boxed: str, answer: str) -> bool:
    bases = [m[1] or m[2] for m in map(_IN_BASE.fullmatch, (boxed, answer)) if m]
    return len(set(bases)) < 2


def _texts_agree(boxed: str, answer: str) -> bool:
    """Words between formulas, which math-verify passes over: `5\\text{ or 6}` is not 5."""
    mine, gold = (" ".join(_TEXT.findall(text)).casefold() for text in (boxed, answer))
    if mine and gold:
        return mine.split() == gold.split()
    return not _ALTERNATIVES.search(mine)


def _verified(boxed: str, answer: str) -> bool:
    golds, mine = _parsed_gold(answer), _parsed(boxed)
    pairs = list(product(golds, mine))
    if any(type(g) is type(m) and g == m for g, m in pairs):  # `==` compares trees as they stand
        return True
    for gold, answered in pairs:
        if isinstance(gold, str) or isinstance(answered, str):
            continue
        if _is_unfinished(answered) and not _is_unfinished(gold):
            continue
        check_size(answered)
        if _agree(gold, answered):
            return True
    return False


def _agree(gold: Basic | MatrixBase, answered: Basic | MatrixBase) -> bool:
    try:
        return verify(
            gold,
            answered,
            timeout_seconds=None,
            allow_set_relation_comp=True,
            raise_on_error=True,
        )
    except MemoryError:
        raise
    except Exception:  # sympy cannot compare them
        return False


def _is_unfinished(tree: Basic | MatrixBase) -> bool:
    return tree.has(*_UNFINISHED)


@lru_cache(maxsize=100_000)
def _parsed_gold(answer: str) -> list[Any]:
    parsed = _parsed(answer)
    if not _has_formula(parsed) and not _unreadable:
        _unreadable.append(answer)
        _log.warning(
            "math cannot parse the reference answer %r and perhaps others: only the same "
            "string is right; tools/check_rewards.py lists them",
            answer,
        )
    return parsed


def _has_formula(parsed: list[Any]) -> bool:
    return not all(isinstance(part, str) for part in parsed)


def _parsed(answer: str) -> list[Any]:
    # math-verify finds formulas by their dollar signs
    return parse(f"${answer}$", [LatexExtractionConfig()], parsing_timeout=0)
