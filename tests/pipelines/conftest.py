"""Adapters import pipelines that are not installed here; stand-ins take their places."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parents[1] / "fake_pipelines"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`ray`, `verl` and `nemo_rl` are tests/fake_pipelines, for one test; forked ranks too."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("BUPO_TARGET_LAYER", "2")
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "2")
    _forget()
    yield
    _forget()


def _forget() -> None:
    """Whatever was imported of them or with them."""
    names = {folder.name for folder in STAND_INS.iterdir()}
    ours = tuple(f"megatron_bupo.pipelines.{name}" for name in names)
    for name in list(sys.modules):
        if name.partition(".")[0] in names or name.startswith(ours):
            del sys.modules[name]
