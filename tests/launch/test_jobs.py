"""What runs on this machine: whose process is it, and how does it end?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bupo.durable import whole_lines
from megatron_bupo.launch import jobs
from megatron_bupo.launch.folder import launch_dir, node_file
from megatron_bupo.record.metrics import FILE
from tests.launch.launching import launch, launch_python
from tests.runs import ROOT, Bed, metrics


def test_a_process_that_began_after_its_id_was_noted_is_another_runs(tmp_path: Path):
    launch_dir(tmp_path).mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(60)", jobs.NODE]
    with subprocess.Popen(command) as process:
        while jobs.NODE not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)  # it has not become that command yet
        node_file(tmp_path).write_text(json.dumps({"pid": process.pid, "code": None}))
        os.utime(node_file(tmp_path), (0, 0))
        assert not jobs.end(tmp_path, now=True)
        os.utime(node_file(tmp_path))
        assert jobs.end(tmp_path, now=True)
        assert process.wait() == -signal.SIGKILL
    assert not jobs.end(tmp_path, now=True)


@pytest.mark.slow
def test_a_launch_that_is_told_to_end_saves_and_goes_on_to_the_same_numbers(
    bed: Bed, tmp_path: Path
):
    python, run_dir = launch_python(), tmp_path / "a run, 100 %"
    cluster, recipe = tmp_path / "here.yaml", tmp_path / "recipe.yaml"
    cluster.write_text(f"kind: local\nprocesses_per_node: 2\npython: {sys.executable}\n")
    recipe.touch()
    words = ["launch", recipe, "--on", cluster, *bed.settings(run_dir, "evaluation.every=0")]
    command = [python, "-m", "megatron_bupo", *map(str, words), "steps=1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=ROOT) as started:
        while len(whole_lines(run_dir / FILE)) < 2 and started.poll() is None:
            time.sleep(0.1)
        started.send_signal(signal.SIGINT)
        assert started.wait(120) == 75
    done = len(whole_lines(run_dir / FILE))
    again = launch(python, *words, f"steps={done + 2}")
    assert again.code == 0, again.err
    expected = bed.train(tmp_path / "whole", "evaluation.every=0", f"steps={done + 2}")
    assert metrics(run_dir) == expected
