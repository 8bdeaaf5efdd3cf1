from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.config import flatten, load_config
from megatron_bupo.config.tracker_rules import check_installed, check_trackers, shareable
from megatron_bupo.errors import InputError
from megatron_bupo.record.tracker_process import FINISHED, Asked
from megatron_bupo.record.trackers import TrackerProcess
from tests.moments import until
from tests.record.runs import records, write
from tests.runs import ROOT, Bed, metrics, run, without_times

FAKES = ROOT / "tests" / "fake_trackers"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fakes, which stand in for the packages, write what they are told."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.setenv("FAKE_TRACKER_LOG", str(tmp_path / "told.jsonl"))
    return tmp_path / "told.jsonl"


def told(log: Path, tracker: str) -> list[dict[str, Any]]:
    lines = map(json.loads, log.read_text().splitlines())
    return [line for line in lines if line["tracker"] == tracker]


@pytest.mark.slow
def test_trackers_are_told_each_step_once_though_a_resumed_run_goes_through_some_again(
    bed: Bed, tmp_path: Path, log: Path
):
    run_dir = tmp_path / "run"
    quick = "checkpoint.every=3", "parallel.pp=1", "evaluation.every=0"
    settings = bed.settings(run_dir, "logging.trackers=[wandb,trackio]", *quick)
    done = run("train", *settings, "steps=5", "servers.env={HF_TOKEN: hf_1}")
    assert done.code == 0, done.err
    assert "wandb: https://wandb.test/run" in done.out
    shutil.rmtree(run_dir / "checkpoints" / "step_000005")
    assert run("train", *settings).code == 0
    whole = metrics(run_dir)
    for tracker in ("wandb", "trackio"):
        lines = told(log, tracker)
        begun = [line for line in lines if "init" in line]
        assert len(begun) == 2
        assert begun[0]["init"] == begun[1]["init"]
        assert begun[0]["config"]["bupo.target_layer"] == 5
        assert begun[0]["config"]["servers.env.HF_TOKEN"] == "(hidden)"
        assert begun[0]["project"] == "megatron_bupo"
        steps = [line for line in lines if "step" in line]
        assert [line["step"] for line in steps] == [0, 1, 2, 3, 4, 5]
        for line, record in zip(steps, whole, strict=True):
            layer = 5.0 if record["step"] < 3 else 0.0
            expected = {k: v for k, v in record.items() if "/" in k}
            got = without_times(line["metrics"])
            assert got == {**expected, "policy/internal_layer": layer}
    assert [line["exit_code"] for line in told(log, "wandb") if "exit_code" in line] == [0, 0]


def begin(name: str, run_dir: Path, first_step: int = 0) -> TrackerProcess:
    return TrackerProcess(name, run_dir, Asked("project", "name", {"steps": 3}, first_step))


def news(process: TrackerProcess) -> list[str]:
    """What it says first, asked after every step."""
    return until(process.step_done)


@pytest.mark.parametrize("how", ["refuse", "break:1"])
def test_a_tracker_that_fails_is_told_of_once(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    monkeypatch.setenv("FAKE_TRACKER", how)
    process = begin("wandb", write(tmp_path / "run", records(("full", 3))))
    said = news(process)
    while not said[0].startswith("warning"):  # where the run can be seen
        said = news(process)
    (warning,) = said
    assert "wandb has stopped (RuntimeError: No API key configured.)" in warning
    assert process.step_done() == process.close(finished=True) == []


def test_a_tracker_that_hangs_costs_nothing_and_is_ended(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_TRACKER", "hang")
    process = begin("wandb", write(tmp_path / "run", records(("full", 3))))
    for _ in range(100_000):  # more than a pipe holds
        process._say(b"\n")
    assert process.step_done() == []
    (warning,) = process.close(finished=True, patience_s=0.2)
    assert "was not done after 0.2 s" in warning


def test_a_run_that_was_cut_off_is_no_finished_one_and_one_that_begins_anew_is_another(
    tmp_path: Path, log: Path
):
    run_dir = write(tmp_path / "run", records(("full", 3)))
    assert begin("wandb", run_dir).close(finished=False) == []
    assert begin("wandb", run_dir).close(finished=True) == []
    begun = [line["init"] for line in told(log, "wandb") if "init" in line]
    assert len(set(begun)) == 2
    assert [line["exit_code"] for line in told(log, "wandb") if "exit_code" in line] == [1, 0]
    assert [line["step"] for line in told(log, "wandb") if "step" in line] == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("logging.trackers=[wandbb]", "wandbb is none of wandb, trackio; the nearest is wandb"),
        ("logging.trackers=[wandb,wandb]", "names one twice"),
        ("logging.project=a/b", "is no name to a tracker"),
        ("logging.name=''", "is no name to a tracker"),
    ],
)
def test_what_no_tracker_can_be_told_is_refused(setting: str, reason: str):
    config = load_config(None, ["model.path=m", "logging.trackers=[trackio]", setting])
    with pytest.raises(InputError, match=reason):
        check_trackers(config)


def test_a_package_that_is_missing_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    config = load_config(None, ["model.path=m", "logging.trackers=[wandb]"])
    with pytest.raises(InputError, match=r"wandb is not installed; pip install 'megatron-bupo\["):
        check_installed(config)


def test_secrets_are_hidden_and_settings_are_not():
    config = load_config(None, ["model.path=m", "servers.env={K: v}", "servers.api_key=sk"])
    plain = flatten(config)
    shown = shareable({**plain, "reward.url": ["http://me:pw@host/x"]})
    assert shown.pop("reward.url") == ["http://(hidden)@host/x"]
    assert {k: v for k, v in shown.items() if plain[k] != v} == {"servers.env.K": "(hidden)"}
    assert shown["servers.api_key"] == "(hidden)"


def follow(name: str, run_dir: Path, first_step: int) -> None:
    """The real thing, from its beginning to its end."""
    asked = Asked("a project", "a name", {"steps": 3, "bupo.target_layer": 5}, first_step)
    command = [sys.executable, "-m", "megatron_bupo.record.tracker_process", name, str(run_dir)]
    words = f"{json.dumps(asked._asdict())}\n".encode() + FINISHED
    done = subprocess.run(command, input=words, capture_output=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_real_trackio_has_each_step_of_a_resumed_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trackio = pytest.importorskip("trackio", reason="the package trackio is not installed")
    assert parameters_of_fake("trackio") <= set(inspect.signature(trackio.init).parameters)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(ROOT)
    every = records(("internal layer 5", 2), ("full", 2))
    every[1]["update/grad_norm"] = None
    for first_step, end in ((0, 3), (2, 4)):
        follow("trackio", write(tmp_path / "run", every[:end]), first_step)
    program = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("a project")
rows = SQLiteStorage.get_logs("a project", run.name)
print(json.dumps([run.config["bupo.target_layer"], rows]))
"""
    asked = [sys.executable, "-c", program]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    layer, rows = json.loads(done.stdout.splitlines()[-1])
    assert layer == 5
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["policy/internal_layer"] for row in rows] == [5, 5, 0, 0]
    rewards = [row["rollout/reward_mean"] for row in rows]
    assert rewards == [record["rollout/reward_mean"] for record in every]


@pytest.mark.slow
def test_real_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(ROOT)
    run_dir = write(tmp_path / "run", records(("internal layer 5", 2), ("full", 2)))
    follow("wandb", run_dir, 0)
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert parameters_of_fake("wandb") <= set(inspect.signature(wandb.init).parameters)


def parameters_of_fake(name: str) -> set[str]:
    """What the fake's `init` takes: no more than the real one's may."""
    tree = ast.parse((FAKES / f"{name}.py").read_text())
    (init,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "init")
    return {argument.arg for argument in init.args.kwonlyargs}
