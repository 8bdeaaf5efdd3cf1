"""Real SGLang servers, as a run starts them, on a CPU. `make test-sglang` has the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
