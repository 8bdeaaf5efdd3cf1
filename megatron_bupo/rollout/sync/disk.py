"""Safetensors in a directory that the servers see too: written bucket by bucket, then swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file

from megatron_bupo.rollout.sync.transport import Bucket, Target, Transport


def version_dir(directory: Path, version: int) -> Path:
    """Where the files of `version` are."""
    return directory / f"version-{version}"


class DiskTransport(Transport):
    """Writes the files; the fleet tells the servers to load them once all have been written."""

    def close(self) -> None:
        """Leave no empty directory."""
        super().close()
        with suppress(OSError):  # there is none, or something in it
            self.directory.rmdir()

    def pass_on(self, bucket: Bucket, targets: Sequence[Target]) -> Mapping[str, str]:  # noqa: ARG002
        file = version_dir(self.directory, self.place.version)
        file = file / f"stage-{self.place.stage}-{self.place.number:05d}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in bucket}, file)
        return {}
