"""sglang-router in front of the servers, where somebody wants its way of choosing among them.

It is a choice of server and nothing else: which servers there are is said over its API, and its own
retries, health checks and circuit breaker are off, because a response must not come from a server
that missed a weight update, and who has not is known to the fleet alone. Only `/generate` goes
through it, word for word (token ids, log-probs and `rid`, in 0.3.2); it answers 404 to
`/abort_request`, `/pause_generation` and all that concerns weights, which go to the servers
themselves. Its default policy, `cache_aware`, brings equal prompts to one server.

It looks at the `/health` of a server that is added, and a paused server is not healthy.
"""

from __future__ import annotations

import json
import math
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_bupo.config import Config, expand
from megatron_bupo.config.server_rules import server_environment
from megatron_bupo.rollout.client import Unreachable
from megatron_bupo.rollout.keeper import Kept, last_words
from megatron_bupo.rollout.processes import HOST, arguments, free_port, shown

_START_S = 60.0
_CHANGE_S = 30.0  # for servers to be added; about one is usual
_LOOK_S = 0.05


class Router:
    """A router of this run, running or not. Its methods wait: call them beside an event loop."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.log = run_dir / "servers" / "router.log"
        self.address = ""  # known once it is started
        self._config = config
        self._kept: Kept | None = None

    def start(self, workers: Sequence[str]) -> None:
        """Start it in front of the servers at the addresses `workers`, and wait for it.

        Raises:
            Unreachable: it did not come up, with the end of its log.
        """
        self.stop()
        port = free_port()
        self.address = f"http://{HOST}:{port}"
        command = self._command(port)
        env = server_environment(self._config)
        self._kept = Kept(command, env=env, log=self.log, title=shown(command, self._config))
        self._wait_for(self._is_up, "to start", _START_S)
        self.set_workers(workers)

    def set_workers(self, workers: Iterable[str]) -> None:
        """Choose among the servers at the addresses `workers`, and no others, from now on.

        What a server that is left out was asked for it may still answer.

        Raises:
            Unreachable: one of them did not answer the router, or the router us.
        """
        wanted, known = set(workers), self._workers()
        for address in known.keys() - wanted:
            self._call("DELETE", f"/workers/{known[address]}")
        key = self._config.servers.api_key
        for address in wanted - known.keys():
            self._call("POST", "/workers", {"url": address, "api_key": key})
        self._wait_for(lambda: self._workers().keys() == wanted, "to have its servers", _CHANGE_S)

    def poll(self) -> int | None:
        """None while it runs, else its exit code."""
        return self._kept.poll() if self._kept is not None else None

    def stop(self) -> None:
        """End it."""
        if self._kept is not None:
            self._kept.stop()

    def _command(self, port: int) -> list[str]:
        servers = self._config.servers
        options = {
            "host": HOST,
            "port": port,
            "prometheus_host": HOST,  # it listens there whether asked to or not
            "prometheus_port": free_port(),
            "api_key": servers.api_key,
            "request_timeout_secs": math.ceil(servers.request_timeout_s),
            "worker_startup_timeout_secs": math.ceil(_CHANGE_S),
            "worker_startup_check_interval": 1,
            "disable_retries": True,
            "disable_health_check": True,
            "disable_circuit_breaker": True,
            "log_level": "warn",
        }
        python = expand(servers.python) if servers.python else sys.executable
        return [python, "-m", "sglang_router.launch_router", *arguments(options)]

    def _is_up(self) -> bool:
        try:
            self._call("GET", "/liveness")
        except Unreachable:
            return False
        return True

    def _workers(self) -> dict[str, str]:
        """Address -> the router's name of it, of all that it chooses among."""
        listed = json.loads(self._call("GET", "/workers"))["workers"]
        return {worker["url"]: worker["id"] for worker in listed}

    def _wait_for(self, condition: Any, what: str, timeout_s: float) -> None:
        assert self._kept is not None
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._kept.poll() is not None or time.monotonic() > deadline:
                end = last_words(self.log, 5)
                raise Unreachable(f"the router took more than {timeout_s:g} s {what}: {end}")
            time.sleep(_LOOK_S)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._config.servers.api_key:
            headers["Authorization"] = f"Bearer {self._config.servers.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_CHANGE_S) as reply:
                return reply.read()
        except OSError as error:  # urllib's own are of this kind
            raise Unreachable(f"router, {path}: {error}") from None
