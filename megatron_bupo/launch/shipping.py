"""What is shipped to nodes that do not see our files: the working tree as it is.

GitArchivePackager, NeMo-Run's default, ships HEAD and says nothing of what is not committed. This
is of its kind because SkyPilot's executor takes no other.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nemo_run import GitArchivePackager


@dataclass(kw_only=True)
class WorkingTree(GitArchivePackager):
    """The files below `folder` of `tree` that git knows or would, committed or not."""

    tree: str = "."
    folder: str = "."

    def package(self, path: Path, job_dir: str, name: str) -> str:  # noqa: ARG002 - NeMo-Run's
        out = Path(job_dir).parent / f"{name}.tar.gz"  # beside what is sent, which has it unpacked
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            self._pack(file)
        return str(out)

    def copy(self, to: Path) -> None:
        """Have them below `to`."""
        to.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        self._pack(packed)
        packed.seek(0)
        with tarfile.open(fileobj=packed) as archive:
            archive.extractall(to, filter="tar")

    def packed_bytes(self) -> int:
        """What they take on their way."""
        packed = io.BytesIO()
        self._pack(packed)
        return packed.tell()

    def _pack(self, out: BinaryIO) -> None:
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for file in files_of(Path(self.tree), self.folder):
                archive.add(file, arcname=str(file.relative_to(self.tree)))


def files_of(tree: Path, folder: str = ".") -> list[Path]:
    """Files of a working tree, committed or not, that git does not ignore."""
    command = ["git", "-C", str(tree), "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard", "--", folder]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    paths = [tree / os.fsdecode(name) for name in listed.split(b"\0") if name]
    return [path for path in paths if path.is_file()]
