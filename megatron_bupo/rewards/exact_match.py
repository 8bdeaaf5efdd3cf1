r"""Is the boxed answer the same string as the reference? The rule of the BuPO authors' runs.

Both are normalised as for the MATH data set (Hendrycks et al., arXiv 2103.03874; the authors run
verl's `utils/reward_score/math.py`), and the reward is 1 where they are equal and 0 elsewhere, also
where there is no box. What the normalisation does, and no more:

- drops line breaks, `\!`, `\left`, `\right`, degrees, `\$`, `\%`, spaces, and a unit on the right,
  which is all that follows `\text{ ` (with the space: `5\text{ or }6` is 5, `5\text{cm}` stays);
- `\\` is `\`, `tfrac` and `dfrac` are `frac`, ` .5` is ` 0.5`, `x=5` is `5` where the name has at
  most two characters, `\sqrt3` is `\sqrt{3}`, `\frac12` is `\frac{1}{2}`;
- `0.5`, the whole answer, is `\frac{1}{2}`, and so is `1/2`, of two integers;
- an answer that it cannot normalise (two units, `\sqrt` of nothing) is compared as it is.

So `0.50`, `.25` for `1/4`, `\text{Yes}` for `Yes`, `1,000` for `1000`, `(B)` for `B` and `2,1` for
`1,2` are wrong. `quirks=true` finds the box as the authors' code does, too: see `boxes.py`.
"""

from __future__ import annotations

import re

from megatron_bupo.rewards.boxes import authors_box, last_boxed

# What is replaced before and after the unit on the right is cut off.
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
_AFTER_UNIT = ((r"\\%", ""), (r"\%", ""), (" .", " 0."), ("{.", "{0."))
_UNIT = r"\text{ "
_INTEGERS = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")


def exact_match(response: str, answer: str, *, quirks: bool = False) -> float:
    """1.0 where the last box is `answer` after normalisation of both, else 0.0."""
    if not isinstance(quirks, bool):
        raise TypeError(f"quirks={quirks} is neither true nor false")
    boxed = authors_box(response) if quirks else last_boxed(response)
    if boxed is None:
        return 0.0
    try:
        return float(normalize(boxed) == normalize(answer))
    except ValueError:
        return float(boxed == answer)


def normalize(answer: str) -> str:
    """The answer as a string that equal answers of the MATH data set share; ValueError where the
    rule does not know one.
    """
    for old, new in _BEFORE_UNIT:
        answer = answer.replace(old, new)
    if answer.count(_UNIT) > 1:
        raise ValueError("two units")
    answer = answer.partition(_UNIT)[0]
    for old, new in _AFTER_UNIT:
        answer = answer.replace(old, new)
    if answer.startswith("."):
        answer = f"0{answer}"
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # `x = 5`
        answer = value
    answer = _with_braces(_with_braces(answer, r"\sqrt").replace(" ", ""), r"\frac")
    if answer == "0.5":
        return r"\frac{1}{2}"
    integers = _INTEGERS.fullmatch(answer)
    return rf"\frac{{{integers[1]}}}{{{integers[2]}}}" if integers else answer


def _with_braces(answer: str, command: str) -> str:
    r"""Braces for the arguments of `\sqrt3` and `\frac12`; `\frac{1}2` keeps what it has."""
    first, *rest = answer.split(command)
    parts = [first]
    for part in rest:
        if not part:
            raise ValueError(f"{command} of nothing")
        if part.startswith("{"):
            parts.append(part)
        elif command == r"\sqrt":
            parts.append(f"{{{part[0]}}}{part[1:]}")
        elif len(part) == 1:  # the rule gives up on all of them
            return answer
        else:
            second = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            parts.append(f"{{{part[0]}}}{second}")
    return command.join(parts)
