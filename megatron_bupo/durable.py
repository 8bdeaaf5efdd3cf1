"""Files that a kill at any moment leaves in order.

One that is replaced gets its name by one rename, when all of it is on disk: at any moment the old
one or the new one stands there, and `.NAME.partial` beside it is never read. A directory is put in
its place in the same way. One that grows by lines may have a torn last line, which is of what was
under way: readers pass it over, and whoever goes on drops it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def partial_path(path: Path) -> Path:
    """Where the file or directory `path` is while it is being written; a kill leaves it there."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is `path` when the block ends well."""
    work = partial_path(path)
    with work.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def add_lines(path: Path, lines: Iterable[str]) -> None:
    """Add `lines`, given without their ends, to the file `path`; on disk when this returns."""
    with path.open("ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of `path` that were written to their end, without it; no file: none."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # asked by reading: another process may rename it
        return []


def lines_since(path: Path, begin: int) -> tuple[int, list[bytes]]:
    """The whole lines of `path` from byte `begin` on, without their ends; and where they end."""
    with path.open("rb") as file:
        file.seek(begin)
        whole, _, torn = file.read().rpartition(b"\n")
        end = file.tell() - len(torn)
    return end, whole.split(b"\n") if end > begin else []


def drop_torn_line(path: Path) -> None:
    """Cut off what comes after the last whole line of `path`, if that is there."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def put_in_place(work: Path, out: Path) -> None:
    """Give the complete directory `work` the name `out`, by one rename once all of it is on disk;
    what was there before goes after it.
    """
    for path in sorted(work.rglob("*")):
        sync(path)
    sync(work)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    work.replace(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the file or the names in the directory `path` on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
