"""Conversion as a user meets it: killed, refused, from a training run, in little memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bupo.launch.lock import hold
from tests.moments import at_line, at_rename, kill_launcher
from tests.runs import Done, run, start

TO_MEGATRON = ("parallel.tp=2", "parallel.pp=2")
SHARDS = ("--shard-bytes", 20_000)
IN_PLACE = at_rename("/out", kill_launcher)  # all is done but for its name


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


@pytest.mark.parametrize(
    "direction",
    ["hf-to-megatron", pytest.param("megatron-to-hf", marks=pytest.mark.slow)],
)
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
    for when in (*(at_line(n, ".units.jsonl", kill_launcher) for n in (3, 5, 8)), IN_PLACE):
        shutil.rmtree(out)
        assert start(*command, first=when).wait().code == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        done = run(*command)
        assert done.code == 0, done.err
        assert ("going on after" in done.out) == (when is not IN_PLACE)
        assert files(out) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_job_has_left_is_begun_anew(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir, out = tiny_model_dir(layers=6), tmp_path / "out"
    command = ("convert", "hf-to-megatron", "--hf", model_dir, "--out", out, *TO_MEGATRON)
    killed = start(*command, first=at_line(4, ".units.jsonl", kill_launcher)).wait()
    assert killed.code == -signal.SIGKILL
    done = to_megatron(model_dir, out, "parallel.pp=3")
    assert done.code == 0, done.err
    assert "going on" not in done.out
    assert len(list(out.glob("*.distcp"))) == 3
    assert to_hf(out, tmp_path / "hf").code == 0
    assert files(tmp_path / "hf") == files(model_dir)


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["run_dir", "newest checkpoint"])
def test_a_training_checkpoint_becomes_the_model_that_the_run_leaves(
    whole: str, finished: Path, tmp_path: Path
):
    path = finished if whole == "run_dir" else finished / "checkpoints" / "step_000006"
    done = to_hf(path, tmp_path / "hf")
    assert done.code == 0, done.err
    assert files(tmp_path / "hf") == files(finished / "hf")


@pytest.mark.slow
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


NOTHING: dict[str, object] = {}
HF_FAULTS = {  # what is done to the HF directory, what is said on the command line -> the reason
    "another dtype": (
        {"dtype": "bfloat16"},
        [],
        "is stored in float32, but config.json says dtype",
    ),
    "tied by mistake": ({"tie_word_embeddings": True}, [], "lm_head.weight: is not the embedding"),
    "more layers": ({"num_hidden_layers": 7}, [], "layers.6.input_layernorm.weight (and 10 more)"),
    "another family": ({"architectures": ["GPT2LMHeadModel"]}, [], "cannot be loaded"),
    "layout": (NOTHING, ["parallel.tp=3"], "does not divide the model's 4 attention heads"),
    "experts": (NOTHING, ["parallel.ep=2"], "shares experts, and layers 1 to 6 have none"),
    "other settings": (NOTHING, ["steps=3"], "says nothing of how the checkpoint is cut"),
    "Megatron's": (NOTHING, ["megatron.foo=1"], "no such field in Megatron-Core's"),
}


@pytest.mark.parametrize(("config", "words", "reason"), HF_FAULTS.values(), ids=HF_FAULTS)
def test_an_hf_checkpoint_is_refused_by_name(
    config: dict[str, object],
    words: list[str],
    reason: str,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model_dir(layers=6), source)
    as_it_was = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(as_it_was | config))
    assert_refused(to_megatron(source, out, *words), reason, out)


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _smaller_vocabulary(folder: Path) -> None:
    file = folder / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 60}))


MEGATRON_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file gone": (_without("__2_0.distcp"), "__2_0.distcp: no such file, but .metadata says"),
    "file cut": (_cut("__2_0.distcp"), "__2_0.distcp: is truncated: "),
    "metadata cut": (_cut(".metadata"), "is not the metadata of a torch_dist checkpoint"),
    "metadata gone": (_without(".metadata"), "has no .metadata, which every torch_dist"),
    "common cut": (_cut("common.pt"), "common.pt: is missing or damaged"),
    "no config": (_without("hf/config.json"), "name a directory that has them with --like DIR"),
    "half-done": (lambda folder: (folder / ".units.jsonl").touch(), "left by a killed process"),
    "vocabulary": (_smaller_vocabulary, "has 64 rows, but config.json says vocab_size=60"),
}


@pytest.mark.parametrize(("damage", "reason"), MEGATRON_FAULTS.values(), ids=MEGATRON_FAULTS)
def test_a_damaged_torch_dist_checkpoint_is_refused_by_name(
    damage: Callable[[Path], object], reason: str, converted: Path, tmp_path: Path
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(converted, source)
    damage(source)
    assert_refused(to_hf(source, out), reason, out)


def test_metadata_that_would_run_a_program_does_not(converted: Path, tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(converted, source)
    (source / ".metadata").write_bytes(pickle.dumps(Harm()))
    assert_refused(to_hf(source, out), "(it names posix.mkdir)", out)
    assert not (tmp_path / "harm").exists()


def test_what_stands_at_out_is_replaced_when_asked_for_and_a_checkpoint(
    tiny_model_dir: Callable[..., Path], converted: Path, tmp_path: Path
):
    out, other = tmp_path / "out", tiny_model_dir(family="qwen2")
    shutil.copytree(other, out)
    assert "exists; choose another directory, or add --overwrite" in to_hf(converted, out).err
    assert files(out) == files(other)
    assert to_hf(converted, out, "--overwrite").code == 0
    assert files(out) == files(tiny_model_dir(layers=6))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    done = to_hf(converted, tmp_path / "thesis", "--overwrite")
    assert "holds no checkpoint, and what it holds would be lost" in done.err
    inside = to_hf(converted, converted / "hf" / "out", "--overwrite")
    assert "are one inside the other" in inside.err


@pytest.mark.slow
def test_two_conversions_to_one_place_are_refused(converted: Path, tmp_path: Path):
    out = tmp_path / "out"
    with hold(tmp_path / ".out.partial"):
        done = to_hf(converted, out)
    assert done.code == 2
    assert "is writing to it (process " in done.err
    assert to_hf(converted, out).code == 0


@pytest.mark.slow
def test_values_that_are_no_numbers_are_told_of_and_a_cast_that_makes_some_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model_dir(), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = to_megatron(source, out, "--dtype", "float16")
    assert_refused(done, "model.norm.weight: has values that float16 cannot hold", out)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = to_megatron(source, out, *TO_MEGATRON)
    assert done.code == 0
    assert done.out.startswith("warning: model.norm.weight has values that are not finite\nwrote ")


@pytest.mark.slow
def test_memory_is_that_of_two_layers_however_large_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tools import bench_conversion as bench

    small = {"vocab_size": 4096, "max_position_embeddings": 256}
    monkeypatch.setattr(bench, "CONFIG", bench.CONFIG | small)
    for cost in bench.measure(tmp_path, 330_000_000, ["parallel.tp=2", "parallel.pp=2"]):
        assert cost.model_bytes > 300_000_000
        assert cost.anonymous < 2 * cost.layer_bytes + 40_000_000
