"""The strict fake SGLang server (tests/fake_sglang) as a process that a test forks and that ends
with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_bupo.rollout.processes import free_port

FAKE = Path(__file__).parents[1] / "fake_sglang"  # goes first in PYTHONPATH
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Fake:
    """A running server."""

    url: str
    process: BaseProcess | None  # None: not ours
    log: Path
    api_key: str | None = None

    def ask(self, path: str, body: Any = None, *, timeout_s: float = 60) -> tuple[int, Any]:
        """Status and answer (JSON where it is some) to a POST of `body`, without one to a GET."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def have(self, **faults: Any) -> None:
        """Have faults from now on, see fake_sglang/sglang/faults.py."""
        assert self.ask("/fake_faults", faults)[0] == 200

    def kill(self) -> None:
        """Have it gone, without a goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def fake_server(model: Path, log: Path, *options: str, **faults: Any) -> Iterator[Fake]:
    """A server of the checkpoint at `model`, with native options and with faults; ready. It runs
    without a tokenizer where the checkpoint has none.
    """
    port = free_port()
    words = ["--model-path", str(model), "--port", str(port), *options]
    if not (model / "tokenizer.json").exists():
        words.append("--skip-tokenizer-init")
    environment = {f"FAKE_SGLANG_{name.upper()}": str(value) for name, value in faults.items()}
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(words, environment, log)
    )
    process.start()
    key = options[options.index("--api-key") + 1] if "--api-key" in options else None
    server = Fake(f"http://127.0.0.1:{port}", process, log, key)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        server.kill()


def _serve(words: list[str], environment: dict[str, str], log: Path) -> None:
    """What `python -m sglang.launch_server WORDS` does, without its seconds of imports."""
    gc.freeze()  # else its collector walks through, and so copies, all that the parent holds
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("wb") as out:
        for descriptor in (1, 2):
            os.dup2(out.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)
    sys.path.insert(0, str(FAKE))
    sys.argv = ["launch_server.py", *words]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _wait_until_ready(server: Fake, process: BaseProcess, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if server.ask("/ready")[0] == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"no server: {server.log.read_text()[-2000:]}")
