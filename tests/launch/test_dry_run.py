"""What would be handed to a scheduler, held against files. `BUPO_WRITE_GOLDEN=1` writes them anew:
read the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.launch.launching import kubeconfig, launch, launch_python
from tests.runs import ROOT

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "slurm": ["--on", "slurm", "--nodes", "2"],
    "slurm_container": ["--on", "slurm_container", "--nodes", "2"],
    "slurm_servers": ["--on", "slurm_servers", "rollout.engine=sglang", "sglang.tp_size=4"],
    "slurm_colocated": [
        *("--on", "slurm", "--nodes", "2", "rollout.engine=sglang", "rollout.colocated=true"),
        *("servers.count=2", "sglang.tp_size=8", "sync.mode=ipc"),
    ],
    "skypilot": ["--on", "skypilot", "--nodes", "2", "run_dir=/bucket/demo"],
    "kubernetes": ["--on", "kubernetes", "--nodes", "2", "run_dir=/bupo/demo"],
    "lepton": ["--on", "lepton", "--nodes", "2", "run_dir=/nemo-workspace/demo"],
}
NEEDS = {"skypilot": "sky", "kubernetes": "kubernetes"}  # of a launch's environment
CLOUDS = ("skypilot", "kubernetes", "lepton")


def normalised(text: str, python: str, folder: Path) -> str:
    """Without what differs between machines and moments."""
    text = text.replace(str(folder), "RUNS").replace(python, "PYTHON").replace(str(ROOT), "TREE")
    text = re.sub(r"\d{8}-\d{6}", "STAMP", text)
    return re.sub(r"(?m)^# code: .*", "# code: TREE", text)


@pytest.mark.slow  # NeMo-Run takes seconds to import
@pytest.mark.parametrize("name", CASES)
def test_what_would_be_submitted_is_what_was_agreed_on(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    python = launch_python(needs=NEEDS.get(name, "nemo_run"))
    where = [] if name in CLOUDS else [f"run_dir={tmp_path / 'demo'}"]
    recipe = ROOT / "conf" / "demo.yaml"
    env = kubeconfig(tmp_path_factory.mktemp("home") / "kube", "http://127.0.0.1:1")
    done = launch(python, "launch", recipe, "--dry-run", *CASES[name], *where, env=env)
    assert done.code == 0, done.err
    text, golden = normalised(done.out, python, tmp_path), GOLDEN / f"{name}.txt"
    if os.environ.get("BUPO_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "launched").exists()
