"""How does a grader that is a server somewhere grade? By `reward.function=http://HOST:PORT/PATH`.

A POST per rollout, with what a reward function may ask for, and a number or `{"reward": number}`
back::

    {"response": "...", "answer": "13", "prompt": "4+9=", "row": {...},
     "response_ids": [1, 3, 14], "finish_reason": "stop"}          ->  1.0

With `options.batch_size` above 1, a list of such objects per POST and a list of as many numbers or
objects back. Further options: `concurrency` (requests under way at a time, of each rank),
`attempts` and `backoff_s` (doubled after each), `headers`, in whose values `$NAME` stands for an
environment variable: a key is then in no file.

What may pass by itself (no connection, none within `reward.timeout_s` seconds, status 429 or 5xx)
is tried again, the rest is not. What gets no reward has 0 and a warning. Where all that are under
way at first fail, the others of the step are not sent, and a step of which the grader has graded
nothing stops the run: there would be nothing to learn from, or what the other terms say alone.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megatron_bupo import progress
from megatron_bupo.config.reward_rules import Term
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.functions import FILLED
from megatron_bupo.types import Grade, Rollout

if TYPE_CHECKING:
    import aiohttp

_SENT = ("response", "answer", "prompt", "row", "response_ids", "finish_reason")
_MOST_BYTES = 1 << 24  # of a reply
_LONGEST = 120  # characters of a reply that a warning repeats


class _Failed(Exception):
    """A request without a usable reply."""


class _MayPass(_Failed):
    """One that is worth another attempt."""


@dataclass(frozen=True)
class _Options:
    batch_size: int = 1
    concurrency: int = 32
    attempts: int = 4
    backoff_s: float = 0.5
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "attempts"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count} must be an integer of at least 1")
        if not 0 <= self.backoff_s < math.inf:
            raise ValueError(f"backoff_s={self.backoff_s} must be at least 0")

    def sent_headers(self) -> dict[str, str]:
        """Headers with what the environment adds to them."""
        return {name: _expanded(name, value) for name, value in self.headers.items()}


class RemoteGrader:
    """The grader at `term.function`."""

    def __init__(self, term: Term, timeout_s: float) -> None:
        self._url, self._timeout_s = term.function, timeout_s
        known = [option.name for option in fields(_Options)]
        for option in term.options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1, cutoff=0)[0]
                where = f"{term.key}.options.{option}"
                raise InputError(where, "is no option of a remote grader", f"the nearest is {near}")
        try:
            self._options = _Options(**term.options)
            self._headers = self._options.sent_headers()
        except (AttributeError, TypeError, ValueError) as error:
            reason = f"do not fit a remote grader ({error})"
            raise InputError(f"{term.key}.options", reason) from None

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """A grade for each of the `rollouts`."""
        size = self._options.batch_size
        batches = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        return [grade for batch in asyncio.run(self._grade(batches)) for grade in batch]

    async def _grade(self, batches: Sequence[Sequence[Rollout]]) -> list[list[Grade]]:
        import aiohttp

        slots, answered, gone = asyncio.Semaphore(self._options.concurrency), False, ""

        async def graded(batch: Sequence[Rollout]) -> list[Grade]:
            nonlocal answered, gone
            async with slots:
                if gone and not answered:
                    return [Grade(0.0, gone)] * len(batch)
                try:
                    rewards = await self._asked(session, batch)
                    answered = True
                    return rewards
                except _Failed as error:
                    gone = f"remote grader: {error}"
                    return [Grade(0.0, gone)] * len(batch)
                finally:
                    progress.beat()

        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers=self._headers
        ) as session:
            return await asyncio.gather(*map(graded, batches))

    async def _asked(self, session: aiohttp.ClientSession, batch: Sequence[Rollout]) -> list[Grade]:
        """Ask for the rewards of `batch`, again and again where that may help."""
        asked = [{name: FILLED[name](rollout) for name in _SENT} for rollout in batch]
        body = json.dumps(asked if self._options.batch_size > 1 else asked[0], default=str).encode()
        for attempt in range(1, self._options.attempts + 1):
            try:
                reply = await self._reply(session, body)
            except _MayPass:
                if attempt == self._options.attempts:
                    raise
                await asyncio.sleep(self._options.backoff_s * 2 ** (attempt - 1))
                progress.beat()
            else:
                return self._read(reply, len(batch))
        raise AssertionError  # there is at least one attempt

    async def _reply(self, session: aiohttp.ClientSession, body: bytes) -> bytes:
        import aiohttp

        reply = bytearray()
        try:
            async with session.post(
                self._url,
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,  # a POST would become a GET
            ) as response:
                async for part in response.content.iter_chunked(1 << 16):
                    reply += part
                    if len(reply) > _MOST_BYTES:
                        raise _Failed(f"a reply of more than {_MOST_BYTES} bytes")
                status = response.status
        except TimeoutError:
            raise _MayPass(f"no reply within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _MayPass(f"{type(error).__name__}: {_short(error)}") from None
        if status == 429 or status >= 500:
            raise _MayPass(f"status {status}: {_short(reply.decode(errors='replace'))}")
        if not 200 <= status < 300:
            raise _Failed(f"status {status}: {_short(reply.decode(errors='replace'))}")
        return bytes(reply)

    def _read(self, reply: bytes, count: int) -> list[Grade]:
        try:
            said = json.loads(reply)
        except (ValueError, RecursionError):
            text = _short(reply.decode(errors="replace"))
            raise _Failed(f"the reply is no JSON: {text}") from None
        if self._options.batch_size == 1:
            return [_grade_of(said)]
        if not isinstance(said, list) or len(said) != count:
            there = f"{len(said)} entries" if isinstance(said, list) else _short(json.dumps(said))
            raise _Failed(f"a list of {count} rewards was asked for, the reply is {there}")
        return [_grade_of(reward) for reward in said]


def _grade_of(said: Any) -> Grade:
    reward = said.get("reward") if isinstance(said, dict) else said
    if isinstance(reward, int | float):
        try:
            if math.isfinite(reward):
                return Grade(float(reward))
        except OverflowError:
            pass
    return Grade(0.0, f"remote grader: the reply is no finite number: {_short(json.dumps(said))}")


def _expanded(name: str, value: object) -> str:
    text = os.path.expandvars(str(value))
    if (unset := re.search(r"\$\{?(\w+)", text)) is not None:
        raise ValueError(
            f"headers.{name} needs the environment variable {unset[1]}, which is unset"
        )
    if not text.isprintable() or not re.fullmatch(r"[!#-'*+.^-z|~0-9A-Z-]+", name):
        raise ValueError(f"headers.{name} cannot be sent")
    return text


def _short(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
