from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.record.metrics import MetricsLog, internal_layer, read_metrics


def write(run_dir: Path, steps: range, *, first_step: int | None = None) -> None:
    first = steps.start if first_step is None else first_step
    with MetricsLog(run_dir, first_step=first, tensorboard=False) as log:
        for step in steps:
            policy: Policy = InternalLayerPolicy(5) if step < 2 else FULL
            log.write(step, policy, {"rollout/reward_mean": step / 3, "update/loss": -0.1 * step})


def test_numbers_survive_in_full_precision(tmp_path: Path):
    values = {"update/loss": 0.1 + 0.2, "update/grad_norm": 1e-300, "time/step_s": 1 / 3}
    with MetricsLog(tmp_path, first_step=0, tensorboard=False) as log:
        log.write(0, FULL, values)
    (record,) = read_metrics(tmp_path)
    assert record == {"step": 0, "policy": "full"} | values


def test_every_line_is_valid_json_even_where_a_number_is_not_finite(tmp_path: Path):
    with MetricsLog(tmp_path, first_step=0, tensorboard=False) as log:
        log.write(0, FULL, {"update/loss": math.nan, "update/grad_norm": math.inf})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict["update/loss"] is None
    assert math.isnan(read_metrics(tmp_path)[0]["update/grad_norm"])


@pytest.mark.parametrize("first_step", range(7))
def test_resuming_at_any_step_gives_the_file_of_an_uninterrupted_run(
    tmp_path: Path, first_step: int
):
    write(tmp_path / "whole", range(8))
    write(tmp_path / "killed", range(6))
    write(tmp_path / "killed", range(first_step, 8), first_step=first_step)
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "torn", ["{", '{"step": 3, "policy": "full", "update/loss": 0.', '{"step": 3}']
)
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path, torn: str):
    write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]
    write(tmp_path, range(3, 5))
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert path.read_bytes().startswith(whole)


def test_a_written_step_survives_a_kill(tmp_path: Path):
    program = f"""
import os, signal
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.record.metrics import MetricsLog
log = MetricsLog({str(tmp_path)!r}, first_step=0, tensorboard=False)
log.write(0, FULL, {{"update/loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]


def test_the_trained_policy_reads_back_as_its_layer(tmp_path: Path):
    write(tmp_path, range(4))
    assert [internal_layer(record) for record in read_metrics(tmp_path)] == [5, 5, None, None]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in [(0, 5, 1.0), (3, 6, 2.0)]:
        with MetricsLog(tmp_path, first_step=first) as log:
            for step in range(first, last):
                policy: Policy = InternalLayerPolicy(2) if step < 4 else FULL
                log.write(step, policy, {"update/loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("update/loss")]
    assert losses == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    layers = [int(event.value) for event in events.Scalars("policy/internal_layer")]
    assert layers == [2, 2, 2, 2, 0, 0]
