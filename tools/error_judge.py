"""What kind of mistake did a failed response make? One of four, as a model judges it.

The judge is behind an OpenAI-compatible endpoint. Its answer counts if it makes one choice
and no other; whatever else it says is unclear. What may pass by itself (no connection, no reply in
time, status 408, 429 or 5xx, a reply that is no chat completion) is tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.rollout.client import Refused, ServerClient, ServerError

EXECUTION, PLANNING, OTHER, UNCLEAR = "execution", "planning", "other", "unclear"
KINDS = {"A": OTHER, "B": EXECUTION, "C": PLANNING, "D": OTHER}
QUESTION = """\
A language model was given a problem, and an automatic grader found its response wrong. Find what \
decided that, the first thing that could not be made good.

# Problem
{question}

# Reference answer
{answer}

# Response{cut}
{text}

# Choices
A: no real attempt. It is empty or off the subject, or repeats itself without getting anywhere.
B: low-level execution. The plan could have led to the answer, but a step of it was carried out \
wrongly: a slip in arithmetic or algebra, a value copied wrongly, a wrong fact or formula, a wrong \
form of the answer.
C: high-level plan. What it set out to do could not lead to the answer: the problem is \
misunderstood, the approach does not fit it or leaves a case out, or it wanders between approaches \
and carries none through.
D: acceptable. The response is right after all, and grader or reference is not.

Give your reasons in a few sentences. Then end with one line that holds your choice alone, so:
Verdict: LETTER"""

_CHOICE = re.compile(
    r"(?i:verdict)\W{0,6}([A-D])(?=\W*$|\s*[^\w\s])([^\n]*)|\A\W*([A-D])\W*\Z", re.MULTILINE
)
FEWEST = 4  # failures in a row that tell of the judge and not of the questions
_HOPELESS = (401, 403, 404, 405)  # for one request as for all


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Where the judge is, and how it is asked."""

    address: str
    model: str
    api_key: str | None = None
    max_tokens: int = 1024
    body: Mapping[str, Any] = field(default_factory=dict)  # more of a request; null takes away
    concurrency: int = 16
    attempts: int = 5
    backoff_s: float = 1.0  # doubled after each attempt
    timeout_s: float = 300.0

    def request(self, text: str) -> dict[str, Any]:
        """The body that asks `text`."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.body,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def key(self, text: str) -> str:
        """What tells one request from all others, wherever the judge is."""
        return hashlib.sha256(json.dumps(self.request(text)).encode()).hexdigest()


def choice_of(reply: str) -> str | None:
    """The letter that `reply` chooses; None: none of the four, or more than one."""
    said = reply.rpartition("</think>")[2].partition("<think>")[0]
    letters: set[str] = set()
    for verdict, rest, alone in _CHOICE.findall(said):
        letters |= {verdict or alone, *re.findall(r"\b[A-D]\b", rest)}
    return letters.pop() if len(letters) == 1 else None


def ask_all(
    judge: Judge,
    questions: Mapping[str, str],
    answered: Callable[[str, str], None],
    *,
    known: bool,
) -> dict[str, str]:
    """Ask all `questions` (key: text), tell each reply to `answered(key, reply)` as it comes, and
    return why there is none to the others. `known`: the judge has answered before.

    Raises:
        InputError: the judge refuses whoever asks it.
        RunStopped: it does not answer any more.
    """
    try:
        return asyncio.run(_ask_all(judge, questions, answered, known))
    except* (InputError, RunStopped) as group:
        error = group.exceptions[0]
    raise error


async def _ask_all(
    judge: Judge, questions: Mapping[str, str], answered: Callable[[str, str], None], known: bool
) -> dict[str, str]:
    failures: dict[str, str] = {}
    in_a_row = 0
    left: Iterator[tuple[str, str]] = iter(questions.items())
    client = ServerClient(judge.address, judge.api_key)

    async def work() -> None:
        nonlocal in_a_row, known
        for key, text in left:
            try:
                reply = await _reply(judge, client, judge.request(text))
            except ServerError as error:
                failures[key] = str(error)
                # One that is refused may be too long, which the next one need not be
                in_a_row += not (known and isinstance(error, Refused) and error.status < 500)
                if in_a_row >= max(judge.concurrency, FEWEST):
                    raise RunStopped(f"the judge at {judge.address} is gone: {error}") from None
            else:
                in_a_row, known = 0, True
                answered(key, reply)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(judge.concurrency):
                group.create_task(work())
    finally:
        await client.close()
    return failures


async def _reply(judge: Judge, client: ServerClient, body: dict[str, Any]) -> str:
    """What the judge says to `body`."""
    for attempt in range(1, judge.attempts + 1):
        try:
            return _said(await client.post("/chat/completions", body, timeout_s=judge.timeout_s))
        except ServerError as error:
            status = error.status if isinstance(error, Refused) else 503
            if status in _HOPELESS:
                way_out = "correct --judge, --model or --api-key-env"
                raise InputError(f"--judge {judge.address}", f"refuses: {error}", way_out) from None
            may_pass = status >= 500 or status in {408, 429}
            if attempt == judge.attempts or not may_pass:
                raise
        await asyncio.sleep(judge.backoff_s * 2 ** (attempt - 1))
    raise AssertionError  # there is at least one attempt


def _said(reply: Any) -> str:
    """The text of a chat completion; a ServerError where `reply` is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ServerError(f"no chat completion: {str(reply)[:100]}") from None
    return content if isinstance(content, str) else ""  # null: it only thought
