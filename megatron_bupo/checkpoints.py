"""Which checkpoints of a run are whole? Names and seals, without torch; `mcore/checkpoint.py` fills
them.

::

    run_dir/checkpoints/step_000020/            the state before step 20
    run_dir/checkpoints/step_000020/hf/         config, tokenizer, ... of the model it began with
    run_dir/checkpoints/step_000020/critic/     the same of PPO's critic, if there is one
    run_dir/checkpoints/step_000020/run.json    its seal: written last, every other file's size
    run_dir/checkpoints/.step_000040.partial/   being written, or left by a kill; never read

A checkpoint gets its name by one rename after its seal, and counts only while every file that the
seal lists is there in full: neither a kill nor a half-made copy is ever taken for a whole one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo import durable
from megatron_bupo.errors import InputError

SEAL = "run.json"
CRITIC = "critic"
SIDE = "hf"  # directory with what stands beside HF weights, for the way back to them
_NAME = re.compile(r"step_(\d{6,})")


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the state before `step` is kept."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def partial_path(run_dir: Path, step: int) -> Path:
    """Where the state before `step` is while it is being written."""
    return durable.partial_path(checkpoint_dir(run_dir, step))


def begin(run_dir: Path, step: int) -> None:
    """Make the empty directory that the state before `step` is written to; what killed runs left
    of others goes.
    """
    work = partial_path(run_dir, step)
    for left in work.parent.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    work.mkdir(parents=True)


def seal(run_dir: Path, step: int, run: Mapping[str, Any]) -> None:
    """Make the filled partial directory of `step` the checkpoint, with the loop's plain values
    `run`.
    """
    final, work = checkpoint_dir(run_dir, step), partial_path(run_dir, step)
    files = [path for path in work.rglob("*") if path.is_file()]
    sizes = {str(file.relative_to(work)): file.stat().st_size for file in files}
    durable.replace_text(work / SEAL, json.dumps({"files": sizes, **run}, indent=2))
    shutil.rmtree(final, ignore_errors=True)  # of an abandoned future: this run came from before it
    work.replace(final)


def drop_old(run_dir: Path, *, keep: int, spared: int | None = None) -> None:
    """Remove all but the `keep` newest whole checkpoints, and that before step `spared`."""
    for step, path in whole_checkpoints(run_dir)[:-keep]:
        if step == spared:
            continue
        half = path.rename(partial_path(run_dir, step))  # a kill now leaves no damaged checkpoint
        shutil.rmtree(half, ignore_errors=True)


def whole_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """`(step, directory)` of every whole checkpoint, oldest first."""
    return [(step, path) for step, path in _named(run_dir) if is_whole(path)]


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """The whole checkpoint to resume from; None where the run has none yet.

    Raises:
        InputError: there are checkpoints, and none of them is whole.
    """
    whole = whole_checkpoints(run_dir)
    if not whole and (damaged := _named(run_dir)):
        raise InputError(
            str(damaged[-1][1]),
            "is damaged, and the run has no other checkpoint",
            f"restore it, or remove {run_dir / 'checkpoints'} to start from step 0",
        )
    return whole[-1] if whole else None


def damaged_checkpoints(run_dir: Path) -> list[Path]:
    """Directories with a checkpoint's name that are not whole."""
    return [path for _, path in _named(run_dir) if not is_whole(path)]


def is_whole(path: Path) -> bool:
    """Is every file that the seal lists there, in full?"""
    try:
        sizes: dict[str, int] = read_run(path)["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def read_run(path: Path) -> dict[str, Any]:
    """The loop's own values in the checkpoint at `path`."""
    return json.loads((path / SEAL).read_text())


def _named(run_dir: Path) -> list[tuple[int, Path]]:
    found = (run_dir / "checkpoints").glob("step_*")
    named = ((_NAME.fullmatch(path.name), path) for path in found)
    return sorted((int(match[1]), path) for match, path in named if match)
