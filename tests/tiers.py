"""What is left out by `make test-fast` of a table of cases, and what by `make test`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

WIDE = [pytest.mark.slow, pytest.mark.wide]  # one more mixture of what other cases have


def cases(table: Mapping[str, tuple[Any, ...]], *, slow: set[str]) -> list[Any]:
    """Parameters from `table`, by name; `slow`: the names of those that take seconds."""
    assert slow <= table.keys()
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in table}
    return [pytest.param(*case, id=name, marks=marks[name]) for name, case in table.items()]
