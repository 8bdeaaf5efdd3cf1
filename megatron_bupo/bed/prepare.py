"""Makes the chain-sum bed for a run that says `prepare: megatron_bupo.bed.prepare:prepare`.

    chain_sums/model/        the base model, 500 supervised steps (under a minute on one core)
    chain_sums/train.jsonl   9,744 prompts
    chain_sums/eval.jsonl    256 held-out prompts

A part appears whole or not at all: it is made beside its place and renamed. Callers at the same
time take turns.
"""

from __future__ import annotations

import fcntl
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.bed import chain_sums
from megatron_bupo.config import expand
from megatron_bupo.durable import partial_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from megatron_bupo.config.schema import Config

BED = "~/.cache/megatron_bupo/chain_sums"
MODEL, TRAIN, EVAL = "model", "train.jsonl", "eval.jsonl"


def prepare(config: Config) -> None:
    """Make the parts of the bed that `config` names and that are missing."""
    bed = Path(expand(BED)).resolve()
    named = [config.model.path, config.model.tokenizer, config.data.train, config.data.eval]
    named += [source.path for source in config.data.sources]
    named += [benchmark.data for benchmark in config.evaluation.benchmarks]
    paths = [Path(expand(path)).resolve() for path in named if path]
    parts = {
        part for part in (MODEL, TRAIN, EVAL) if any(p.is_relative_to(bed / part) for p in paths)
    }
    if parts:
        make_bed(bed, parts=parts)


def make_bed(
    directory: Path, *, parts: set[str] | None = None, steps: int = 500, seed: int = 0
) -> None:
    """Make what `directory` lacks of `parts` (None: all); `steps` and `seed`: of the base model."""

    def save_model(target: Path) -> None:
        from megatron_bupo.bed.base_model import save_base_model

        save_base_model(target, steps=steps, seed=seed)

    makers: dict[str, Callable[[Path], object]] = {
        TRAIN: lambda target: target.write_text(chain_sums.jsonl(chain_sums.TRAIN)),
        EVAL: lambda target: target.write_text(chain_sums.jsonl(chain_sums.EVAL)),
        MODEL: save_model,
    }
    wanted = {part: make for part, make in makers.items() if parts is None or part in parts}
    if all((directory / part).exists() for part in wanted):
        return
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / ".lock"):
        for part, make in wanted.items():
            if not (directory / part).exists():
                _make(directory / part, make)


def _make(target: Path, make: Callable[[Path], object]) -> None:
    """Make `target` under another name, then give it its own."""
    partial = partial_path(target)
    if partial.is_dir():  # of a build that was killed: the lock is ours, so nobody is at it
        shutil.rmtree(partial)
    make(partial)
    partial.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; the kernel releases it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
