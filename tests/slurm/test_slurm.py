"""A real Slurm of two nodes on this machine: a run that is preempted there is requeued, and goes on
to the numbers of one that nothing disturbed. `make test-slurm`; needs root and Debian's Slurm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.launching import launch, launch_python
from tests.runs import ROOT, Bed, metrics
from tests.test_resume import assert_same_run, steps_recorded

LIMIT_S = 280
CLUSTER = """
kind: slurm
gpus_per_node: 0
processes_per_node: 2
time: "00:30:00"
grace_s: 60
python: {python}
env: {{GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: "1"}}
executor: {{partition: debug}}
"""

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that describes a running Slurm."""
    launch_python()
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs root and Debian's slurm-wlm: tools/slurm_here.sh install")
    folder, script = tmp_path_factory.mktemp("slurm"), str(ROOT / "tools" / "slurm_here.sh")
    started = subprocess.run(
        [script, "start", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    os.environ["SLURM_CONF"] = started.stdout.strip()
    try:
        file = folder / "here.yaml"
        file.write_text(CLUSTER.format(python=sys.executable))
        yield file
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        subprocess.run([script, "stop", str(folder)], check=False)
        del os.environ["SLURM_CONF"]


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state_of(run_dir: Path) -> str:
    job = json.loads((run_dir / "launch" / "launch.json").read_text())["job"]
    asked = ["squeue", "-h", "-j", job, "-o", "%T"]
    return subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip()


def test_a_preempted_job_is_requeued_and_goes_on_to_the_same_numbers(
    cluster: Path, bed: Bed, tmp_path: Path
):
    python = launch_python()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    changes = ["parallel.dp=2", "checkpoint.every=1000", "evaluation.every=0", "steps=12"]

    def launched(run_dir: Path, *options: str) -> list[str]:
        settings = bed.settings(run_dir, *changes)
        done = launch(python, "launch", recipe, "--on", cluster, *options, *settings)
        assert done.code == 0, done.err
        return done.out.splitlines()

    run_dir = tmp_path / "preempted"
    told = launched(run_dir, "--detach")
    assert "# train: 2 nodes x 2 ranks" in told
    wait_until(lambda: steps_recorded(run_dir) >= 2)
    job = json.loads((run_dir / "launch" / "launch.json").read_text())["job"]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: not state_of(run_dir))
    starts = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert starts == [f"slurm-{job}-0", f"slurm-{job}-1"]
    status = launch(python, "status", run_dir)
    assert "steps       12 done" in status.out
    said = launch(python, "logs", run_dir, "--rank", "0").out
    assert "resuming at step" in said
    nothing_there = launch(python, "logs", run_dir, "--rank", "4")
    assert (nothing_there.code, nothing_there.err.count("\n")) == (2, 1)

    undisturbed = tmp_path / "undisturbed"
    launched(undisturbed)
    assert len(metrics(run_dir)) == 12
    assert_same_run(run_dir, undisturbed)


def test_a_cancelled_job_saves_what_it_learned_and_is_not_requeued(
    cluster: Path, bed: Bed, tmp_path: Path
):
    python, run_dir = launch_python(), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    settings = bed.settings(run_dir, "steps=1000", "checkpoint.every=1000", "evaluation.every=0")
    done = launch(python, "launch", recipe, "--on", cluster, "--detach", *settings)
    assert done.code == 0, done.err
    wait_until(lambda: steps_recorded(run_dir) >= 1)
    second = launch(python, "launch", recipe, "--on", cluster, *settings)
    assert second.code == 2
    assert "is at work there (RUNNING" in second.err
    assert launch(python, "cancel", run_dir).out == "asked to save and end\n"
    wait_until(lambda: not state_of(run_dir))
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1
    assert len(list((run_dir / "logs").iterdir())) == 1
