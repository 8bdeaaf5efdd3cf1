"""What a test can have go wrong: `FAKE_SGLANG_<NAME>` in the environment, or the fields as JSON to
`POST /fake_faults` of a running server.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, fields
from typing import Any, NoReturn


@dataclass
class Faults:
    """All of them; numbers count down to zero, where nothing is wrong."""

    version: str = "0.5.23"  # what it says to be; before 0.5.23 it behaves like that too
    seconds_per_token: float = 0.0  # keeps a batch in flight
    die_after_requests: int = 0  # at the arrival of that request
    die_after_tokens: int = 0  # of all requests together
    fail_generates: int = 0  # 500
    hang_generates: int = 0  # accepted and never answered
    refuse_updates: int = 0  # 400 to weights, however they come
    forget_updates: int = 0  # 200 to weights, and nothing changes
    stale_answers: int = 0  # responses that claim to be of `stale_version`
    stale_version: str = "0"
    health_timeout_s: float = 20.0

    def change(self, values: dict[str, Any]) -> None:
        """Set fields, given as in JSON or in the environment."""
        kinds = {field.name: type(field.default) for field in fields(self)}
        for name, value in values.items():
            setattr(self, name, kinds[name](value))

    def due(self, name: str) -> bool:
        """Is `name` wrong this time? Counts."""
        left = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left > 0

    def deadly(self, name: str, count: int = 1) -> None:
        """Die once `name` has counted down to zero."""
        left = getattr(self, name)
        if left > 0:
            setattr(self, name, max(0, left - count))
            if left <= count:
                die(name)

    @property
    def old(self) -> bool:
        """Is it a release without update sessions and version spans?"""
        return tuple(map(int, self.version.split(".")[:3])) < (0, 5, 23)


FAULTS = Faults()
FAULTS.change(
    {
        field.name: os.environ[key]
        for field in fields(Faults)
        if (key := f"FAKE_SGLANG_{field.name.upper()}") in os.environ
    }
)


def die(why: str) -> NoReturn:
    """Go as the real one goes when its scheduler raises: killed, without an answer to anyone."""
    print(f"Scheduler hit an exception: {why}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")
