"""Real SGLang servers, as a run starts them, on a CPU. `make test-sglang` has the environment."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.schema import Config
from megatron_bupo.rollout.processes import ServerProcess

PYTHON = "MEGATRON_BUPO_SGLANG_PYTHON"
STUBS = Path(__file__).parent / "stubs"
ENVIRONMENT = {
    "PYTHONPATH": STUBS,
    "SGLANG_USE_CPU_ENGINE": 1,
    "OMP_NUM_THREADS": 1,  # else threads of all processes wait for each other, 40 times as long
    "HF_HUB_OFFLINE": 1,
    "TRANSFORMERS_OFFLINE": 1,
}
OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 65536,
    "skip_server_warmup": "true",
    "sleep_on_idle": "true",  # else a server that does nothing takes a whole core
}


def sglang_settings() -> list[str]:
    """What makes a run start real servers; skips the test where there is no SGLang."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"needs SGLang: `make test-sglang`, or its interpreter in {PYTHON}")
    return [
        "rollout.engine=sglang",
        f"servers.python={python}",
        *(f"servers.env.{name}={value}" for name, value in ENVIRONMENT.items()),
        *(f"sglang.{name}={value}" for name, value in OPTIONS.items()),
    ]


def config_of(model: Path, *settings: str) -> Config:
    """A run on `model`, whose directory needs no tokenizer."""
    needed = [f"model.path={model}", "data.train=train.jsonl", "sglang.skip_tokenizer_init=true"]
    return load_config(None, [*needed, *sglang_settings(), *settings])


def answers(server: ServerProcess) -> bool:
    """Is it up? Fails the test if it never will be."""
    assert server.poll() is None, server.last_words()
    try:
        with urllib.request.urlopen(f"{server.address}/health", timeout=30) as reply:
            return reply.status == 200
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    """Wait for it, on a busy machine too."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
