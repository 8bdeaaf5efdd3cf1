"""Is there room for what the run will write, and are its checkpoints whole?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_bupo.checkpoints import damaged_checkpoints, whole_checkpoints
from megatron_bupo.config import Config, expand
from megatron_bupo.config.server_rules import check_sync_directory
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, of_error
from megatron_bupo.errors import InputError
from megatron_bupo.planner.counts import all_parameters
from megatron_bupo.planner.known_models import models_of
from megatron_bupo.record.transfer import in_bytes

AREA = "disk"
TRIED = 2**20  # bytes


def disk(config: Config) -> Iterator[Finding]:
    """At run_dir."""
    run_dir = Path(expand(config.run_dir)).absolute()
    standing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if (refused := _refusal(standing)) is not None:
        reason = f"run_dir={config.run_dir} cannot be made or written to: {standing}: {refused}"
        yield Finding(AREA, PROBLEM, reason, "choose another run_dir, or make room there")
        return
    if config.rollout.engine == "sglang":
        try:
            check_sync_directory(config)
        except InputError as error:
            yield of_error(AREA, error)
    whole = whole_checkpoints(run_dir)
    for damaged in damaged_checkpoints(run_dir) if whole else ():  # else the recipe's tell of it
        way_out = f"it will be passed over; remove it, or see why {run_dir} was full"
        yield Finding(AREA, WARNING, f"{damaged} is not whole", way_out)
    if whole:
        yield Finding(AREA, OK, f"{run_dir} resumes at step {whole[-1][0]}")
    free = shutil.disk_usage(standing).free
    try:
        one = checkpoint_bytes(config)
    except InputError:  # the recipe's findings tell of it
        yield Finding(AREA, OK, f"{in_bytes(free)} free at {standing}")
        return
    yield _room(config, standing, free=free, one=one, there=len(whole))


def _refusal(folder: Path) -> str | None:
    """Why `folder` takes no file, by trying: a quota, say, is seen by nothing else."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _room(config: Config, at: Path, *, free: int, one: int, there: int) -> Finding:
    """A new checkpoint is written before the oldest goes."""
    new = max(1, config.checkpoint.keep + 1 - there)
    export = int(one * _exported_share(config)) if config.checkpoint.export_hf else 0
    needed = new * one + export
    said = (
        f"{in_bytes(free)} free at {at}, {in_bytes(needed)} needed: {new} checkpoints of "
        f"{in_bytes(one)}" + (f" and the export of {in_bytes(export)}" if export else "")
    )
    way_out = "choose a run_dir with more room, or lower checkpoint.keep"
    if free < one:
        return Finding(AREA, PROBLEM, said, way_out)
    if free < needed:
        return Finding(AREA, WARNING, said, way_out)
    return Finding(AREA, OK, said)


def checkpoint_bytes(config: Config) -> int:
    """Of one: weights, and what the optimizer steps with; the critic's too."""
    policy, critic, _ = models_of(config)
    number = 2 + 12 if config.model.dtype == "bfloat16" else 4 + 8
    return number * sum(all_parameters(arch) for arch in (policy, critic) if arch is not None)


def _exported_share(config: Config) -> float:
    return 2 / 14 if config.model.dtype == "bfloat16" else 4 / 12
