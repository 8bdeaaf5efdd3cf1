"""A directory that is written unit by unit: a kill at any time leaves nothing that looks whole, and
the same command goes on where it was.

All of it goes into `.NAME.partial` beside the directory. A line in a journal there says that a unit
is on disk; the first line says of what job, and another job begins anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bupo.durable import (
    add_lines,
    drop_torn_line,
    partial_path,
    put_in_place,
    whole_lines,
)
from megatron_bupo.errors import InputError
from megatron_bupo.launch import lock

JOURNAL = ".units.jsonl"


class Unfinished:
    """The directory `folder` on its way to being whole."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.done: dict[str, Any] = {}  # unit -> what was noted of it
        self._journal = folder / JOURNAL
        lines = self._lines()
        if not lines or lines[0] != json.loads(json.dumps(job)):
            _empty(folder)
            self._append(job)
            lines = []
        for line in lines[1:]:
            self.done[line["unit"]] = line["note"]

    def note(self, unit: str, note: Any) -> None:
        """What the caller has made of `unit` is on disk, and `note` is all that it must remember
        of it.
        """
        self._append({"unit": unit, "note": note})
        self.done[unit] = note

    def _lines(self) -> list[Any]:
        """Of the journal; a last one that is torn goes."""
        drop_torn_line(self._journal)
        try:
            return [json.loads(line) for line in whole_lines(self._journal)]
        except ValueError:
            return []

    def _append(self, line: Mapping[str, Any]) -> None:
        add_lines(self._journal, [json.dumps(line)])


@contextmanager
def unfinished(out: Path, job: Mapping[str, Any], *, overwrite: bool) -> Iterator[Unfinished]:
    """What will be `out` when the block ends well; `job` is what must be the same for what is done
    to count.

    Raises:
        InputError: another process is writing it, or it has come to be.
    """
    work = partial_path(out)
    with lock.hold(work, key="--out ", patience_s=1):
        check_free(out, overwrite=overwrite)  # another process may just have finished it
        begun = Unfinished(work, job)
        try:
            yield begun
        except KeyboardInterrupt as error:
            error.add_note("the same command goes on where this one stopped")
            raise
        except InputError:  # what is read proved to be unfit, and so is what was made of it
            shutil.rmtree(work)
            raise
        for name in (JOURNAL, lock.FILE):
            (work / name).unlink()
        put_in_place(work, out)


def check_free(out: Path, *, overwrite: bool) -> None:
    """`out` may be made, or replaced."""
    where = f"--out {out}"
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise InputError(where, "is not a directory", "choose another one")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(where, "exists", "choose another directory, or add --overwrite")
    if not any((out / name).exists() for name in ("config.json", ".metadata")):
        reason = "holds no checkpoint, and what it holds would be lost"
        raise InputError(where, reason, "choose another directory")


def existing_ancestor(path: Path) -> Path:
    """The nearest thing above `path` that exists."""
    return next(above for above in path.absolute().parents if above.exists())


def is_unfinished(folder: Path) -> bool:
    """Is `folder` one that a kill has left?"""
    return (folder / JOURNAL).exists() or (
        folder.name.startswith(".") and folder.name.endswith(".partial")
    )


def _empty(folder: Path) -> None:
    """Remove all but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != lock.FILE:
            path.unlink()
