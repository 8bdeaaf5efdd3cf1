"""A SGLang server that a tool measures, on a CPU where there is no GPU."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bupo.config import Config
from megatron_bupo.rollout.processes import ServerProcess
from tests.sglang.real import ENVIRONMENT, OPTIONS, PYTHON

NEVER_S = 1e9


def server_settings(python: str | None) -> list[str]:
    """What has a run start servers by the interpreter `python` (None: the one in the environment,
    or the trainer's own), which nobody asks for their health.
    """
    found = python or os.environ.get(PYTHON)
    settings = ["rollout.engine=sglang", f"servers.health_every_s={NEVER_S}"]
    settings += [f"servers.python={found}"] if found else []
    if not torch.cuda.is_available():
        settings += [f"servers.env.{name}={value}" for name, value in ENVIRONMENT.items()]
        settings += [f"sglang.{name}={value}" for name, value in OPTIONS.items()]
    return settings


@dataclass(frozen=True)
class RunningServer:
    """Where it is."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used. Linux alone tells."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == self.pid:  # the server leads a session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_server(config: Config, folder: Path) -> Iterator[RunningServer]:
    """A server as `config` describes it, up; its log is in `folder`.

    Raises:
        RuntimeError: it did not come up, with what it had to say.
    """
    server = ServerProcess(0, config, folder)
    deadline = time.monotonic() + config.servers.start_timeout_s
    try:
        server.start()
        while not _answers(server.address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server came up: {server.last_words()}")
            time.sleep(0.1)
        yield RunningServer(server.address, server.pid or 0)
    finally:
        server.stop()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=30) as reply:
            return reply.status == 200
    except OSError:
        return False
