"""A run that is killed, at whatever moment, and started again is the run that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.durable import whole_lines
from tests.moments import at_line, at_rename, kill_launcher, until
from tests.runs import Bed, Done, Running, metrics, run, start, start_python

pytestmark = pytest.mark.slow


def wait_until(holds: Callable[[], object], running: Running) -> None:
    """Until `holds()`, which is to happen while `running` runs."""
    until(holds, while_=running.is_alive)


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    assert metrics(run_dir) == metrics(undisturbed)
    assert_same_weights(run_dir, undisturbed)


def assert_same_weights(run_dir: Path, undisturbed: Path) -> None:
    one, other = (load_file(d / "hf" / "model.safetensors") for d in (run_dir, undisturbed))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def steps_recorded(run_dir: Path) -> int:
    """Lines of metrics.jsonl so far."""
    return len(whole_lines(run_dir / "metrics.jsonl"))


def steps_trained(out: str) -> list[int]:
    """The steps that a run's output tells of, counted from 1 as it does."""
    lines = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
    return [int(word.partition("/")[0]) for word in lines]


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run as it stood after five of its six steps."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000006")
    shutil.rmtree(copy / "hf")
    return copy


def at_random_moments(bed: Bed, run_dir: Path, seed: int) -> Iterator[Running]:
    """A run, started again and again, at some moment of its start and of its first steps."""
    rng = random.Random(seed)
    for steps in (0, 1, 2):
        running = start("train", *bed.settings(run_dir))
        wait_until(lambda running=running: len(running.ranks()) == 2, running)
        wait_until(lambda steps=steps: steps_recorded(run_dir) >= steps, running)
        time.sleep(rng.uniform(0.0, 0.2))
        yield running


def signal_rank(rank: int, number: signal.Signals) -> None:
    """For a rank to do: send `number` to one of them."""
    ranks = psutil.Process(os.getsid(0)).children()
    sorted(ranks, key=lambda process: process.pid)[rank].send_signal(number)


def signal_launcher(number: signal.Signals) -> None:
    """For a rank to do."""
    os.kill(os.getsid(0), number)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_a_launcher_killed_at_random_moments(bed: Bed, finished: Path, tmp_path: Path, seed: int):
    for running in at_random_moments(bed, tmp_path, seed):
        running.kill()
    last = at_line(6 - steps_recorded(tmp_path), "metrics.jsonl", kill_launcher)
    start("train", *bed.settings(tmp_path), first=last).wait()
    assert steps_recorded(tmp_path) < 6
    done = run("train", *bed.settings(tmp_path))
    assert done.code == 0, done.err
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.wide), 1])
def test_a_rank_killed_at_random_moments(bed: Bed, finished: Path, tmp_path: Path, victim: int):
    for running in at_random_moments(bed, tmp_path, victim):
        running.ranks()[victim].kill()
        done = running.wait()
        assert done.code == 1, done
        first, last = done.err.splitlines()
        assert first == f"error: rank {victim} was killed by SIGKILL"
        assert last.startswith("stopped")
    done = run("train", *bed.settings(tmp_path))
    assert done.code == 0, done.err
    assert_same_run(tmp_path, finished)


def test_torchrun_killed_leaves_no_rank_and_local_ranks_go_on(bed: Bed, tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "megatron_bupo", "train", *bed.settings(tmp_path, "steps=1000")]
    running = start_python(*torchrun, *command)
    wait_until((tmp_path / "checkpoints" / "step_000002").exists, running)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = run("train", *bed.settings(tmp_path, "steps=2"))
    assert done.code == 0, done.err
    assert "resuming at step " in done.out


def test_a_run_killed_while_it_writes_a_checkpoint(bed: Bed, finished: Path, tmp_path: Path):
    partial = tmp_path / "checkpoints" / ".step_000003.partial"
    unsealed = at_rename(f"{partial.name}/run.json", kill_launcher)
    start("train", *bed.settings(tmp_path), first=unsealed).wait()
    assert list(partial.glob("*.distcp"))
    done = run("train", *bed.settings(tmp_path))
    assert done.code == 0, done.err
    assert steps_trained(done.out) == [3, 4, 5, 6]
    assert_same_run(tmp_path, finished)
    assert not list(tmp_path.glob("checkpoints/.*"))


def test_what_killed_runs_leave_is_not_taken_for_a_checkpoint(
    bed: Bed, finished: Path, stopped: Path
):
    whole = stopped / "checkpoints" / "step_000005"
    shutil.copytree(whole, stopped / "checkpoints" / ".step_000006.partial")
    damaged = stopped / "checkpoints" / "step_000099"
    shutil.copytree(whole, damaged)
    largest = max(damaged.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "policy": "fu')
    done = run("train", *bed.settings(stopped))
    assert done.code == 0, done.err
    assert f"passing over {damaged}: not whole\nresuming at step 5 from {whole}\n" in done.out
    assert_same_run(stopped, finished)


def test_a_run_without_any_whole_checkpoint_is_refused(bed: Bed, stopped: Path):
    path = stopped / "checkpoints" / "step_000005"
    (path / "run.json").unlink()
    done = run("train", *bed.settings(stopped))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {path}: is damaged, and the run has no other checkpoint; ")
    assert done.err.count("\n") == 1


def test_a_run_that_stopped_before_its_last_export_makes_it(
    bed: Bed, finished: Path, tmp_path: Path
):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    done = run("train", *bed.settings(tmp_path / "run"))
    assert done.code == 0, done.err
    assert steps_trained(done.out) == []
    assert "\n6 steps of BuPO over 2 processes" in done.out
    assert_same_run(tmp_path / "run", finished)


def test_a_run_may_be_extended(bed: Bed, finished: Path, tmp_path: Path):
    bed.train(tmp_path, "steps=4")
    done = run("train", *bed.settings(tmp_path))
    assert "changed since: steps was 4, is 6\n" in done.out
    assert steps_trained(done.out) == [5, 6]
    assert_same_run(tmp_path, finished)


def test_a_resumed_run_says_which_settings_have_changed(bed: Bed, stopped: Path):
    changed = ["optimizer.lr=1e-5", "bupo.internal_steps=2", "megatron.recompute_granularity=full",
               "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"]  # fmt: skip
    done = run("train", *bed.settings(stopped, *changed))
    assert done.code == 0, done.err
    told = [line for line in done.out.splitlines() if line.startswith("changed since: ")]
    assert [line for line in told if " run_dir " not in line] == [
        "changed since: bupo.internal_steps was 3, is 2",
        "changed since: optimizer.lr was 0.0005, is 1e-05",
        'changed since: megatron.recompute_granularity was not set, is "full"',
        'changed since: megatron.recompute_method was not set, is "uniform"',
        "changed since: megatron.recompute_num_layers was not set, is 1",
    ]
    assert metrics(stopped)[5]["update/learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.vpp=1",
        "parallel.tp=2",
        "parallel.dp=2",
    ],
)
def test_a_run_goes_on_under_another_layout(bed: Bed, finished: Path, stopped: Path, layout: str):
    done = run("train", *bed.settings(stopped, "parallel.pp=1", layout))
    assert done.code == 0, done.err
    last, undisturbed = metrics(stopped)[5], metrics(finished)[5]
    assert last.pop("policy") == undisturbed.pop("policy")
    assert last == pytest.approx(undisturbed, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "was"),
    [
        ("parallel.distributed_optimizer=true", "parallel.distributed_optimizer=false"),
        ("model.dtype=bfloat16", "model.dtype=float32"),
    ],
)
def test_settings_that_a_checkpoint_cannot_follow_are_refused(
    bed: Bed, stopped: Path, change: str, was: str
):
    done = run("train", *bed.settings(stopped, change))
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {change}: {stopped / 'checkpoints' / 'step_000005'} holds the state of an "
        f"optimizer with {was}, which does not fit; set {was}, or choose another run_dir\n"
    )


def test_a_checkpoint_of_another_model_is_refused(
    bed: Bed, stopped: Path, tiny_model_dir: Callable[..., Path]
):
    other = tiny_model_dir(layers=8)
    named = [f"model.path={other}", f"model.tokenizer={bed.folder / 'model'}"]
    done = run("train", *bed.settings(stopped, *named))
    assert (done.code, done.out) == (2, "")
    path = stopped / "checkpoints" / "step_000005"
    assert done.err.startswith(f"error: model.path={other}: is a model with layers=8, but {path} ")
    assert done.err.count("\n") == 1


def test_a_directory_that_a_run_is_using_is_refused(bed: Bed, finished: Path, tmp_path: Path):
    running = start("train", *bed.settings(tmp_path, "steps=1000"))
    wait_until((tmp_path / "metrics.jsonl").exists, running)
    done = run("train", *bed.settings(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: run_dir={tmp_path}: another run is writing to it (process {running.pid}); "
        "wait for it, end it, or choose another run_dir\n"
    )
    assert running.kill().err == ""


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_run_that_is_preempted_saves_what_it_learned_and_goes_on_to_the_same_numbers(
    bed: Bed, finished: Path, tmp_path: Path, world: int, number: signal.Signals
):
    settings = bed.settings(tmp_path, f"parallel.pp={world}", "checkpoint.every=1000")
    told = at_line(2, "metrics.jsonl", lambda: signal_launcher(number))
    done = start("train", *settings, first=told).wait()
    steps = steps_recorded(tmp_path)
    assert 2 <= steps < 6
    assert done == Done(75, done.out, f"stopped; the same command goes on at step {steps}\n")
    done = run("train", *settings)
    assert done.code == 0, done.err
    assert steps_trained(done.out) == [*range(steps + 1, 7)]
    undisturbed = finished  # on two ranks
    if world == 1:
        bed.train(undisturbed := tmp_path / "undisturbed", "parallel.pp=1")
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_is_preempted_stops_all(bed: Bed, finished: Path, tmp_path: Path, rank: int):
    settings = bed.settings(tmp_path, "checkpoint.every=1000")
    told = at_line(1, "metrics.jsonl", lambda: signal_rank(rank, signal.SIGUSR2))
    assert start("train", *settings, first=told).wait().code == 75
    assert 1 <= steps_recorded(tmp_path) < 6
    assert run("train", *settings).code == 0
    assert_same_run(tmp_path, finished)


def test_a_warning_that_comes_before_the_first_step_is_heeded(bed: Bed, tmp_path: Path):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # as launch/node.py has it
    try:
        running = start("train", *bed.settings(tmp_path, "parallel.pp=1"))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    os.kill(running.pid, signal.SIGUSR2)
    done = running.wait()
    assert done.code == 75
    assert done.err == "stopped before the first checkpoint; the same command starts anew\n"


def test_a_second_signal_ends_a_run_at_once(bed: Bed, tmp_path: Path):
    begun = tmp_path / "begun"
    (tmp_path / "slow.py").write_text(f"""
import pathlib, time
def reward(response, answer):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(600)
""")
    slow = (f"reward.function={tmp_path / 'slow.py'}:reward", "reward.timeout_s=600")
    running = start("train", *bed.settings(tmp_path, *slow, "evaluation.every=0"))
    wait_until(begun.exists, running)
    os.kill(running.pid, signal.SIGTERM)
    until(lambda: not is_pending(signal.SIGTERM, running.pid))
    time.sleep(0.3)  # for what Python makes of it
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait().code == 143


def is_pending(number: signal.Signals, pid: int) -> bool:
    """Has `pid` not yet been told of it?"""
    (mask,) = re.findall(r"^ShdPnd:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(
    bed: Bed, tmp_path: Path, world: int, number: signal.Signals, code: int
):
    running = start("train", *bed.settings(tmp_path, "steps=1000", f"parallel.pp={world}"))
    wait_until((tmp_path / "checkpoints" / "step_000002").exists, running)
    assert len(running.graders()) == world
    os.kill(running.pid, number)
    done = running.wait()
    assert done.code == code
    newest = max(path.name for path in tmp_path.glob("checkpoints/step_*"))
    step = json.loads((tmp_path / "checkpoints" / newest / "run.json").read_text())["step"]
    assert done.err == f"stopped; the same command goes on at step {step}\n"


def test_a_run_that_is_told_to_stop_before_its_first_checkpoint_says_so(bed: Bed, tmp_path: Path):
    told = at_line(1, "metrics.jsonl", lambda: signal_launcher(signal.SIGINT))
    done = start("train", *bed.settings(tmp_path, "checkpoint.every=1000"), first=told).wait()
    assert done.err == "stopped before the first checkpoint; the same command starts anew\n"


def test_a_grader_that_is_killed_does_not_stop_the_run(bed: Bed, finished: Path, tmp_path: Path):
    running = start("train", *bed.settings(tmp_path))
    wait_until((tmp_path / "checkpoints" / "step_000001").exists, running)
    graders = running.graders()
    for grader in graders:
        grader.kill()
    done = running.wait()
    assert done.code == 0, done.err
    assert steps_trained(done.out) == [1, 2, 3, 4, 5, 6]
    lost = sum(line["rollout/reward_warnings"] for line in metrics(tmp_path))
    assert lost <= len(graders)


def test_a_run_that_is_not_finite_stops_and_goes_on_from_its_checkpoint_once_it_is(
    bed: Bed, stopped: Path, finished: Path, tmp_path: Path
):
    (tmp_path / "huge.py").write_text(
        "def reward(response, answer):\n    return 1e38 * (sum(map(ord, response)) % 2)\n"
    )
    huge = (f"reward.function={tmp_path / 'huge.py'}:reward", "algorithm.normalize_by_std=false")
    done = run("train", *bed.settings(stopped, *huge, "optimizer.max_skipped_updates=1"))
    assert done.code == 2
    assert "step 6: 1 skipped updates in a row: the gradient norm was " in done.err
    done = run("train", *bed.settings(stopped))
    assert done.code == 0, done.err
    assert_same_run(stopped, finished)
