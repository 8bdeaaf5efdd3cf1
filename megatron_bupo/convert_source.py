"""Which torch_dist checkpoint does a path mean, and which HF directory stands beside it?

A torch_dist directory, a training checkpoint (`run_dir/checkpoints/step_N`), a run_dir (its newest
whole checkpoint), or a directory of Megatron-LM's with its tracker file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.checkpoints import SEAL, SIDE, is_whole, newest_checkpoint, read_run
from megatron_bupo.config import expand
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.tensors import CheckpointIndex, check_tensors, check_tied, read_index
from megatron_bupo.preflight import other_than_before
from megatron_bupo.resumable import is_unfinished

METADATA = ".metadata"
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's
GIVE = "give a torch_dist directory, a training checkpoint, or a run_dir"


@dataclass(frozen=True)
class MegatronSource:
    """A checkpoint directory, what its run says of itself, and where to look for HF files."""

    path: Path
    run: Mapping[str, Any] | None  # None: no training checkpoint
    like: Path  # has config.json and what stands beside it
    model_dirs: tuple[Path, ...]  # where the HF weights may be that training began with


def find_source(megatron: str, like: str | None) -> MegatronSource:
    """The checkpoint that `--megatron` means, with `--like` or what else has its side files."""
    path = _checkpoint(Path(expand(megatron)), f"--megatron {megatron}")
    run = None
    if (path / SEAL).exists():
        if not is_whole(path):
            raise InputError(str(path), "is damaged: a file is missing or cut off", "restore it")
        run = _run_of(path)
    named = [Path(expand(like))] if like else []
    began_with = [Path(expand(run["config"]["model.path"]))] if run else []
    for folder in (*named, path / SIDE, *began_with):
        if (folder / "config.json").exists() or like:
            return MegatronSource(path, run, folder, (*named, *began_with))
    reason = f"has no {SIDE} directory with config.json and tokenizer"
    if began_with:
        reason += f", and model.path={began_with[0]} is gone"
    way_out = "name a directory that has them with --like DIR"
    raise InputError(f"--megatron {megatron}", reason, way_out)


def _run_of(path: Path) -> dict[str, Any]:
    """What the seal says of the run, of which settings and model are asked for."""
    run = read_run(path)
    config, architecture = run.get("config"), run.get("architecture")
    if not (isinstance(config, dict) and isinstance(config.get("model.path"), str)):
        reason = "does not say which model the run has trained (config: model.path)"
        raise InputError(str(path / SEAL), reason, "restore it")
    if not isinstance(architecture, dict):
        raise InputError(str(path / SEAL), "has no architecture", "restore it")
    return run


def _checkpoint(folder: Path, where: str) -> Path:
    """The torch_dist directory that the user means by `folder`."""
    if not folder.is_dir():
        raise InputError(where, "is a file" if folder.exists() else "no such directory", GIVE)
    if is_unfinished(folder):
        reason = "was left by a killed process and is not whole"
        raise InputError(where, reason, "run that process again")
    if (folder / METADATA).exists():
        return folder
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise InputError(where, "is a run_dir without a checkpoint", GIVE)
        return newest[1]
    if (folder / TRACKER).exists():
        return _of_megatron_lm(folder, where)
    if (folder / "config.json").exists():
        raise InputError(where, "is an HF checkpoint, or half of another one", GIVE)
    if any(folder.glob("mp_rank_*")) or any(folder.glob("iter_*/mp_rank_*")):
        reason = "is a checkpoint in Megatron-LM's own torch format"
        way_out = "save it as torch_dist: Megatron-LM's --ckpt-convert-format torch_dist does"
        raise InputError(where, reason, way_out)
    raise InputError(where, f"has no {METADATA}, which every torch_dist checkpoint has", GIVE)


def _of_megatron_lm(folder: Path, where: str) -> Path:
    text = (folder / TRACKER).read_text(errors="replace").strip()
    named = folder / ("release" if text == "release" else f"iter_{text:0>7}")
    if not text.isdecimal() and text != "release":
        raise InputError(str(folder / TRACKER), f"says {text!r}, which is no iteration", GIVE)
    if not named.is_dir():
        raise InputError(where, f"{TRACKER} says {text}, but {named} does not exist", GIVE)
    return _checkpoint(named, f"--megatron {named}")


def read_its_architecture(source: MegatronSource) -> Architecture:
    """The model of `source`, as config.json and the run that wrote the checkpoint both have it."""
    arch = read_architecture(source.like)
    before = source.run["architecture"] if source.run else {}
    for name, was, now in other_than_before(before, arch):
        raise InputError(
            str(source.like / "config.json"),
            f"is of a model with {name}={now}, but {source.path} is of one with {name}={was}",
            "name the HF directory that the run began with by --like DIR",
        )
    return arch


def find_base(source: MegatronSource, arch: Architecture, present: int) -> CheckpointIndex:
    """The HF weights that training began with: the layers above the lowest `present`, which alone
    are in the checkpoint, are as there.
    """
    where = f"{source.path}: layer {present + 1}"
    if source.run is None or source.run.get("trained_layers", arch.layers) > present:
        reason = "config.json asks for it, the checkpoint does not hold it"
        raise InputError(where, reason, "use the config.json of this model")
    for folder in source.model_dirs:
        if folder.is_dir() and read_architecture(folder) == arch:
            index = read_index(folder)
            check_tensors(arch, index)
            check_tied(arch, index)
            return index
    raise InputError(
        where,
        "is not in a checkpoint of the internal phase, and the HF checkpoint that the run began "
        f"with is gone ({', '.join(map(str, source.model_dirs))})",
        "name it with --like DIR",
    )
