"""`megatron-bupo launch` in an environment that has NeMo-Run, which need not be the trainer's: the
one that `make install-launch` makes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
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
    if not _imports(python, needs):
        pytest.skip(f"{python} has no {needs}")
    return python


@cache  # it takes seconds
def _imports(python: str, names: str) -> bool:
    found = subprocess.run([python, "-c", f"import {names}"], check=False, capture_output=True)
    return found.returncode == 0


def launch(
    python: str,
    *words: object,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Done:
    """`megatron-bupo WORDS` by `python`, to its end, with the variables `env` beside ours."""
    done = subprocess.run(
        [python, "-m", "megatron_bupo", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def kubeconfig(folder: Path, address: str) -> dict[str, str]:
    """Variables by which a Kubernetes at `address` is found, by a user called me."""
    folder.mkdir()
    path, names = folder / "kubeconfig", {"cluster": "here", "user": "me"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": names}],
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
    }
    path.write_text(json.dumps(config))
    return {"KUBECONFIG": str(path), "LOGNAME": "me"}
