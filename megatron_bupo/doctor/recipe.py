"""Would this recipe start here? What `train` looks at before it starts, all of it, not up to the
first thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_bupo.config import Config, expand
from megatron_bupo.config.checks import check, doubts
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, of_error
from megatron_bupo.errors import InputError
from megatron_bupo.planner.plan import world_of
from megatron_bupo.preflight import check_critic, check_data, check_files, check_resumption

AREA = "recipe"


def recipe(config: Config, world: int | None) -> Iterator[Finding]:
    """Settings, model, data, reward, checkpoint; `world` ranks under torchrun."""
    ranks = world if world is not None else world_of(config, None)
    yield from _said("settings", lambda: check(config, ranks, here=False))
    for doubt in doubts(config):
        yield Finding(AREA, WARNING, doubt.removeprefix("warning: ").removeprefix("note: "))
    if config.prepare is not None and not Path(expand(config.model.path)).is_dir():
        yield Finding(AREA, OK, f"model and data: made by prepare={config.prepare}")
        return
    found: list[Any] = []
    yield from _said(f"model {config.model.path}", lambda: found.append(check_files(config)))
    if config.has_critic:
        yield from _said("critic", lambda: check_critic(config))
    notes: list[str] = []
    yield from _said(f"data {config.data.train}", lambda: notes.extend(check_data(config)))
    for note in notes:
        yield Finding(AREA, WARNING, note)
    if found:
        yield from _said("checkpoint", lambda: check_resumption(config, found[0]))


def _said(what: str, look: Callable[[], Any]) -> Iterator[Finding]:
    """`what` is well, or what is wrong with it."""
    try:
        look()
    except InputError as error:
        yield of_error(AREA, error)
    except (OSError, ValueError, TypeError) as error:
        reason = f"{what}: {type(error).__name__}: {error}".replace("\n", " ")
        yield Finding(AREA, PROBLEM, reason, "see whether the file is whole")
    else:
        yield Finding(AREA, OK, f"{what}: as it should be")
