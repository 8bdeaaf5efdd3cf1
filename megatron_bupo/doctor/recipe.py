"""Would this recipe start here? What `train` looks at before it starts, all of it, not up to the
first thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bupo.config import Config, expand
from megatron_bupo.config.checks import check, doubts
from megatron_bupo.config.tracker_rules import check_installed
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, of_error
from megatron_bupo.errors import InputError
from megatron_bupo.planner.plan import world_of
from megatron_bupo.preflight import check_critic, check_data, check_files, check_resumption

AREA = "recipe"
SEEN = "look at these rows: data.bad_rows, data.deduplicate, data.contamination say what is done"


def recipe(config: Config, world: int | None) -> Iterator[Finding]:
    """Settings, model, data, reward, checkpoint; `world` ranks under torchrun."""
    settings = partial(_check_settings, config, world)
    if (yield from _said("settings", settings)):
        yield from _doubts(config)
    if config.prepare is not None and not Path(expand(config.model.path)).is_dir():
        yield Finding(AREA, OK, f"model and data: made by prepare={config.prepare}")
        return
    models: list[Any] = []
    yield from _said(f"model {config.model.path}", lambda: models.append(check_files(config)))
    if config.has_critic:
        yield from _said("critic", lambda: models.append(check_critic(config)))
    notes: list[str] = []
    if config.debug.replay is None:
        yield from _said(f"data {config.data.train}", lambda: notes.extend(check_data(config)))
    yield from (Finding(AREA, WARNING, note, SEEN) for note in notes)
    if len(models) == 1 + config.has_critic:
        yield from _said("checkpoint", lambda: check_resumption(config, *models))


def _check_settings(config: Config, world: int | None) -> None:
    """Against each other, and against packages; not yet against the model."""
    check(config, world_of(config, None) if world is None else world, here=False)
    check_installed(config)
    if config.megatron:
        from megatron_bupo.mcore.native import check_native

        check_native(config.megatron)


def _doubts(config: Config) -> Iterator[Finding]:
    for doubt in doubts(config):
        kind, _, said = doubt.partition(": ")
        what, _, way_out = said.partition("; ")
        if kind == "warning":
            yield Finding(AREA, WARNING, what, way_out or "remove it")
        else:
            yield Finding(AREA, OK, said)


def _said(what: str, look: Callable[[], Any]) -> Generator[Finding, None, bool]:
    """`what` is well, or what is wrong with it; whether it is well."""
    try:
        look()
    except InputError as error:
        yield of_error(AREA, error)
    except Exception as error:  # of a damaged file, by whoever reads it
        reason = f"{what}: {type(error).__name__}: {error}".replace("\n", " ")
        yield Finding(AREA, PROBLEM, reason, "see whether the file is whole")
    else:
        yield Finding(AREA, OK, f"{what}: as it should be")
        return True
    return False
