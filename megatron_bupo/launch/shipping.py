"""What is shipped to nodes that do not see our files: the working tree as it is.

GitArchivePackager, NeMo-Run's default, ships HEAD and says nothing of what is not committed. These
are of its kind because SkyPilot's executor takes no other.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from nemo_run import GitArchivePackager


@dataclass(kw_only=True)
class WorkingTree(GitArchivePackager):
    """The files of `tree` that git knows or would, committed or not."""

    tree: str = "."

    def package(self, path: Path, job_dir: str, name: str) -> str:  # noqa: ARG002 - NeMo-Run's
        out = Path(job_dir) / f"{name}.tar.gz"
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out, "w:gz") as archive:
            for file in files_of(Path(self.tree)):
                archive.add(file, arcname=str(file.relative_to(self.tree)))
        return str(out)


@dataclass(kw_only=True)
class Nothing(GitArchivePackager):
    """What runs is installed on the nodes."""

    def package(self, path: Path, job_dir: str, name: str) -> str:  # noqa: ARG002 - NeMo-Run's
        return ""


def files_of(tree: Path) -> list[Path]:
    """Files of a working tree, committed or not, that git does not ignore."""
    command = ["git", "-C", str(tree), "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    paths = [tree / os.fsdecode(name) for name in listed.split(b"\0") if name]
    return [path for path in paths if path.is_file()]
