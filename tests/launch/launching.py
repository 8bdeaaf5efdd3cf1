"""`megatron-bupo launch` in an environment that has NeMo-Run, which need not be the trainer's: the
one that `make install-launch` makes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, Done

VARIABLE = "MEGATRON_BUPO_LAUNCH_PYTHON"


def launch_python(*, needs: str = "nemo_run") -> str:
    """An interpreter that has NeMo-Run; skips the test where there is none."""
    python = os.environ.get(VARIABLE)
    if python is None and importlib.util.find_spec("nemo_run") is not None:
        python = sys.executable
    if python is None:
        pytest.skip(f"NeMo-Run is not installed: make install-launch, and name it in {VARIABLE}")
    found = subprocess.run([python, "-c", f"import {needs}"], check=False, capture_output=True)
    if found.returncode:
        pytest.skip(f"{python} has no {needs}")
    return python


def launch(python: str, *words: object, cwd: Path = ROOT, timeout_s: float = 300) -> Done:
    """`megatron-bupo WORDS` by `python`, to its end."""
    done = subprocess.run(
        [python, "-m", "megatron_bupo", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr)
