"""Conversion as a user meets it: killed, refused, from a training run, in little memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import Done, run, start

TO_MEGATRON = ("parallel.tp=2", "parallel.pp=2")
SHARDS = ("--shard-bytes", 20_000)


def to_megatron(model_dir: Path, out: Path, *more: object) -> Done:
    return run("convert", "hf-to-megatron", "--hf", model_dir, "--out", out, *more)


def to_hf(megatron: Path, out: Path, *more: object) -> Done:
    return run("convert", "megatron-to-hf", "--megatron", megatron, "--out", out, *more)


def files(folder: Path) -> dict[str, bytes]:
    """What lies where in `folder`."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def assert_refused(done: Done, reason: str, out: Path) -> None:
    """In one line that has `reason`, before anything is written."""
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert reason in done.err
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


@pytest.fixture(scope="module")
def converted(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A torch_dist checkpoint of a Qwen3. To be read only."""
    out = tmp_path_factory.mktemp("converted") / "torch_dist"
    assert to_megatron(tiny_model_dir(layers=6), out, *TO_MEGATRON).code == 0
    return out


def test_there_and_back_every_file_is_as_it_was(
    tiny_model_dir: Callable[..., Path], converted: Path, tmp_path: Path
):
    done = to_hf(converted, tmp_path / "hf")
    assert done.code == 0, done.err
    assert files(tmp_path / "hf") == files(tiny_model_dir(layers=6))
    assert done.out.startswith(f"wrote {tmp_path / 'hf'}: 69 tensors, ")


def test_an_index_is_what_transformers_writes_and_reads(
    tiny_model_dir: Callable[..., Path], converted: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(layers=6))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert to_hf(converted, tmp_path / "ours", *SHARDS).code == 0
    name = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / d / name).read_text()) for d in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_killed_conversion_leaves_nothing_whole_and_the_same_command_goes_on(
    direction: str, tiny_model_dir: Callable[..., Path], converted: Path, tmp_path: Path
):
    out = tmp_path / "out"
    source = {
        "hf-to-megatron": ("--hf", tiny_model_dir(layers=6)),
        "megatron-to-hf": ("--megatron", converted),
    }
    more = TO_MEGATRON if direction == "hf-to-megatron" else SHARDS
    command = ["convert", direction, *source[direction], "--out", out, *more]
    undisturbed = run(*command)
    assert undisturbed.code == 0, undisturbed.err
    expected = files(out)
    resumed, chance = 0, random.Random(0)
    for _ in range(6):
        shutil.rmtree(out, ignore_errors=True)
        running = start(*command)
        journal = tmp_path / ".out.partial" / ".units.jsonl"
        units = chance.randrange(1, 9)
        deadline = time.monotonic() + 30
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= units):
            assert time.monotonic() < deadline
            if out.exists():
                break
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert out.exists() != (tmp_path / ".out.partial").exists()
        if not out.exists():
            done = run(*command)
            assert done.code == 0, done.err
            resumed += "going on after" in done.out
        assert files(out) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert resumed > 1


def test_what_another_job_has_left_is_begun_anew(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir, out = tiny_model_dir(layers=6), tmp_path / "out"
    running = start("convert", "hf-to-megatron", "--hf", model_dir, "--out", out, *TO_MEGATRON)
    while not list(tmp_path.glob(".out.partial/*.distcp")):
        time.sleep(0.0005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists(), "the kill came too late"
    done = to_megatron(model_dir, out, "parallel.pp=3")
    assert done.code == 0, done.err
    assert "going on" not in done.out
    assert len(list(out.glob("*.distcp"))) == 3
    assert to_hf(out, tmp_path / "hf").code == 0
    assert files(tmp_path / "hf") == files(model_dir)


@pytest.mark.parametrize("whole", ["run_dir", "newest checkpoint"])
def test_a_training_checkpoint_becomes_the_model_that_the_run_leaves(
    whole: str, finished: Path, tmp_path: Path
):
    path = finished if whole == "run_dir" else finished / "checkpoints" / "step_000006"
    done = to_hf(path, tmp_path / "hf")
    assert done.code == 0, done.err
    assert files(tmp_path / "hf") == files(finished / "hf")


def test_it_does_so_without_the_model_that_the_run_began_with(finished: Path, tmp_path: Path):
    path = tmp_path / "run" / "checkpoints" / "step_000006"
    shutil.copytree(finished / "checkpoints" / "step_000006", path)
    seal = json.loads((path / "run.json").read_text())
    seal["config"]["model.path"] = str(tmp_path / "gone")
    (path / "run.json").write_text(json.dumps(seal))
    assert to_hf(path, tmp_path / "hf").code == 0
    assert files(tmp_path / "hf") == files(finished / "hf")
    shutil.rmtree(path / "hf")
    out = tmp_path / "other"
    assert_refused(to_hf(path, out), "is damaged", out)
    for name in [name for name in seal["files"] if name.startswith("hf/")]:
        del seal["files"][name]
    (path / "run.json").write_text(json.dumps(seal))
    assert_refused(to_hf(path, out), f"model.path={tmp_path / 'gone'} is gone; name a", out)
    assert to_hf(path, out, "--like", finished / "hf").code == 0
    assert files(out) == files(finished / "hf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_asked_for_and_named_in_config_json(
    dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(tied=True)
    assert to_megatron(model_dir, tmp_path / "mid", "--dtype", dtype).code == 0
    assert to_hf(tmp_path / "mid", tmp_path / "hf").code == 0
    before, after = (load_file(d / "model.safetensors") for d in (model_dir, tmp_path / "hf"))
    kind = getattr(torch, dtype)
    assert all(torch.equal(after[name], tensor.to(kind)) for name, tensor in before.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config == json.loads((model_dir / "config.json").read_text()) | {"dtype": dtype}
