r"""Where in a response does its answer stand? In the last `\boxed{...}`: no box, no answer.

`authors_box` is the same question as the BuPO authors' code answers it (verl's
`utils/reward_score/math.py`, after Hendrycks et al.), with its quirks:

- one `\boxed ` with a space makes it overlook every `\boxed{...}`: the answer is then what follows
  the last `\boxed ` up to a dollar sign, or up to the end of the response;
- `\{` and `\}` count as braces, so `\boxed{\left\{ x \right.}` never ends and is no answer;
- `\boxed5` and `\fbox{5}` are no answers; the last `\boxed` need not be the command
  (`\boxedtext`), and where that one is no answer, none is.
"""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, or, where there is none, in the last `\fbox{...}`.

    None where that is not closed. Without braces (`\boxed 5`) it is what follows up to white space
    or a dollar sign.
    """
    for command in ("boxed", "fbox"):
        commands = list(re.finditer(rf"\\{command}(?![A-Za-z])\s*", text))
        if commands:
            start = commands[-1].end()
            if not text.startswith("{", start):
                return re.split(r"[\s$]", text[start:], maxsplit=1)[0].rstrip(".,;:") or None
            end = closing_brace(text, start)
            return None if end is None else text[start + 1 : end]
    return None


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace that opens at `start` is closed; `\{` is no brace."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return brace.start()
    return None


def authors_box(text: str) -> str | None:
    """The answer as the authors' code finds it, see above."""
    if r"\boxed " in text:
        return text.rpartition(r"\boxed ")[2].partition("$")[0]
    start = text.rfind(r"\boxed")
    if start < 0 or not text.startswith("{", start + len(r"\boxed")):
        return None
    depth, start = 0, start + len(r"\boxed")
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None
