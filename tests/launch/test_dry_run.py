"""What would be handed to a scheduler, held against files. `BUPO_WRITE_GOLDEN=1` writes them anew:
read the difference.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, run

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "slurm": ["--on", "slurm", "--nodes", "2"],
    "slurm_container": ["--on", "slurm_container", "--nodes", "2"],
    "slurm_servers": ["--on", "slurm_servers", "rollout.engine=sglang", "sglang.tp_size=4"],
    "skypilot": ["--on", "skypilot", "--nodes", "2", "run_dir=/bucket/demo"],
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None,
    reason='NeMo-Run is not installed: pip install -e ".[launch]"',
)


def normalised(text: str, folder: Path) -> str:
    """Without what differs between machines and moments."""
    text = text.replace(str(folder), "RUNS").replace(str(ROOT), "TREE")
    text = text.replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")
    text = re.sub(r"\d{8}-\d{6}", "STAMP", text)
    return re.sub(r"(?m)^# code: .*", "# code: TREE", text)


@pytest.mark.slow  # NeMo-Run takes seconds to import
@pytest.mark.parametrize("name", CASES)
def test_what_would_be_submitted_is_what_was_agreed_on(name: str, tmp_path: Path):
    if name == "skypilot" and importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install skypilot")
    where = [f"run_dir={tmp_path / 'demo'}"] if name != "skypilot" else []
    done = run("launch", ROOT / "conf/demo.yaml", "--dry-run", *CASES[name], *where)
    assert done.code == 0, done.err
    text, golden = normalised(done.out, tmp_path), GOLDEN / f"{name}.txt"
    if os.environ.get("BUPO_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert list(tmp_path.iterdir()) == []
