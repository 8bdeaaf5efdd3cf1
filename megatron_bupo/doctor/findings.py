"""What a look at something comes to: it is well, doubtful, or a run would fail of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_bupo.errors import InputError

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One of them; what is not ok has a way out."""

    area: str  # versions | devices | machine | ranks | recipe | disk | servers
    level: str
    what: str
    way_out: str = ""


def of_error(area: str, error: InputError) -> Finding:
    """What a check refuses, as a problem."""
    where, reason, way_out = error.args
    what = f"{where}: {reason}".replace("\n", " ")
    return Finding(area, PROBLEM, what, way_out or "correct it, or name another")


def looked_at(area: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `look` finds; if it fails itself, that is a finding too."""
    try:
        yield from look()
    except InputError as error:
        yield of_error(area, error)
    except Exception as error:  # whatever is broken here must not hide the other findings
        said = f"could not be looked at: {type(error).__name__}: {error}"
        way_out = "see whether this package or device works by itself"
        yield Finding(area, WARNING, said.replace("\n", " "), way_out)
