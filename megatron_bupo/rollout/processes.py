"""A SGLang server that we start on this machine: its command line, its environment, its log.

What it is told are our settings that it must agree with, then `sglang.*` word for word. It ends
when we do (`keeper.py`), and may be started again any number of times.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bupo.config import Config, expand
from megatron_bupo.config.load import HIDDEN
from megatron_bupo.config.server_rules import gpus_per_server, server_environment
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.keeper import Kept, last_words

HOST = "127.0.0.1"
PORTS = range(30000, 32768)  # below those that the kernel hands to connections


class ServerProcess:
    """Server `index` of a run, running or not."""

    def __init__(
        self, index: int, config: Config, run_dir: Path, *, host: str = HOST, name: str = ""
    ) -> None:
        """It gets a free port, another at each start. Who asks it from another machine needs a
        `host` that it can reach; `name` tells servers of several machines apart.

        Raises:
            InputError: this machine has too few GPUs.
        """
        self.log = run_dir / "servers" / f"server-{name or index}.log"
        self.address = ""  # known once it is started
        self._index = index
        self._host = host
        self._config = config
        self._env = server_environment(config)
        self._first_gpu = _first_gpu(config, index)
        self._starts = 0
        self._kept: Kept | None = None

    @property
    def pid(self) -> int | None:
        """Of the server while it runs."""
        return self._kept.pid if self._kept is not None and self._kept.poll() is None else None

    def start(self, port: int | None = None) -> None:
        """Start it, again if need be; it is ready some time later. At `port`, if that matters."""
        self.stop()
        port = port or free_port(self._host)
        self.address = f"http://{self._host}:{port}"
        command = self.command(port)
        title = f"start {self._starts}: {shown(command, self._config)}"
        self._starts += 1
        self._kept = Kept(command, env=self._env, log=self.log, title=title)

    def poll(self) -> int | None:
        """None while it runs, else its exit code (128 + n after a signal n)."""
        assert self._kept is not None
        return self._kept.poll()

    def stop(self) -> None:
        """Kill it and all that it has started, and nothing else.

        A server that is asked by SIGTERM first finishes its requests and takes seconds even without
        any; it has nothing to save.
        """
        if self._kept is not None:
            self._kept.stop()

    def last_words(self, lines: int = 15) -> str:
        """The end of its log, for an error message."""
        return last_words(self.log, lines)

    def command(self, port: int) -> list[str]:
        """What is executed to have it listen on `port`."""
        config = self._config
        seed = np.random.SeedSequence((config.seed, self._index, self._starts)).generate_state(1)
        options = {
            "model_path": expand(config.model.path),
            "tokenizer_path": config.model.tokenizer and expand(config.model.tokenizer),
            "host": self._host,
            "port": port,
            "api_key": config.servers.api_key,
            "dtype": config.model.dtype,
            "weight_version": 0,
            # Servers, and the lives of one, draw different responses to equal prompts
            "random_seed": int(seed[0] >> 1),
            "enable_memory_saver": config.rollout.colocated,
            # Of what it gave back it needs the layers again that an update does not bring
            "enable_weights_cpu_backup": config.rollout.colocated,
            **config.sglang,
            "base_gpu_id": self._first_gpu,
        }
        python = config.servers.python
        launch = [expand(python) if python else sys.executable, "-m", "sglang.launch_server"]
        return [*launch, *arguments(options)]


def shown(command: Sequence[str], config: Config) -> str:
    """A command line that may be written down."""
    return " ".join(HIDDEN if word == config.servers.api_key else word for word in command)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Native options as words of a command line: `{"tp_size": 2, "disable_radix_cache": True}`.

    True is the bare flag, False and None leave it out, a list is several values, a mapping is JSON.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            several = isinstance(value, Sequence) and not isinstance(value, str)
            words += [
                json.dumps(item) if isinstance(item, Mapping) else str(item)
                for item in (value if several else [value])
            ]
    return words


def free_port(host: str = HOST) -> int:
    """A port that nobody listens on, and likely nobody will before a server has come up."""
    for port in [*random.SystemRandom().sample(PORTS, 64), 0]:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError(f"no free port on {host}")


def own_address(towards: str) -> str:
    """The address of this machine by which the machine `towards` reaches it."""
    family, kind, _, _, there = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing
        return probe.getsockname()[0]


def _first_gpu(config: Config, index: int) -> int | None:
    """The first of server `index`'s GPUs: after those of the trainer's ranks on this machine, or
    among them where they are shared. None on a machine without.
    """
    import torch

    if config.sglang.get("device") == "cpu" or not torch.cuda.is_available():
        if config.rollout.colocated:
            raise InputError(
                "rollout.colocated=true", "torch sees no GPU to share here", "set it to false"
            )
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    before = config.sglang.get("base_gpu_id", 0 if config.rollout.colocated else ranks)
    each, found = gpus_per_server(config), torch.cuda.device_count()
    first = before + index * each
    if first + each > found:
        raise InputError(
            f"servers.count={config.servers.count}",
            f"server {index} would use GPUs {first} to {first + each - 1} of {found}",
            "start fewer servers or trainer ranks, or set rollout.colocated=true to share GPUs",
        )
    return first
