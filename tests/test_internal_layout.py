"""A run whose internal phase has a layout of its own is the run that has none, to the user."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bupo.config import load_config
from megatron_bupo.errors import InputError
from megatron_bupo.preflight import preflight
from tests.rollout.fake import fake_server
from tests.runs import Bed, metrics, run

pytestmark = pytest.mark.slow

OWN = ("bupo.internal_layout.dp=2", "checkpoint.every=1", "checkpoint.keep=9")
GAPS = "rollout/logprob_gap"  # between trainer and engine, under the full policy


@pytest.fixture(scope="module")
def own(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finished`, but for internal layer 5 of 6 on two data-parallel ranks. To be read only."""
    run_dir = tmp_path_factory.mktemp("own") / "run"
    bed.train(run_dir, *OWN)
    return run_dir


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


def test_its_record_and_its_model_are_those_of_the_run_in_place(own: Path, finished: Path):
    for step, (ours, theirs) in enumerate(zip(metrics(own), metrics(finished), strict=True)):
        assert ours.pop("policy") == theirs.pop("policy")
        gaps = [key for key in theirs if key.startswith(GAPS)]
        assert bool(gaps) == (step in {0, 3, 4, 5})
        for gap in gaps if step == 0 else ():
            del theirs[gap]  # five layers of six have no full policy to compare with the engine's
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    before, after = weights(finished / "hf"), weights(own / "hf")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_it_resumes_to_the_bit_before_at_and_after_the_switch(
    step: int, bed: Bed, own: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(own, run_dir)
    shutil.rmtree(run_dir / "hf")
    for later in range(step + 1, 7):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{later:06d}")
    assert bed.train(run_dir, *OWN) == metrics(own)
    again, undisturbed = weights(run_dir / "hf"), weights(own / "hf")
    assert all(torch.equal(again[name], tensor) for name, tensor in undisturbed.items())


def test_a_run_that_ends_in_the_internal_phase_leaves_the_whole_model(
    bed: Bed, own: Path, tmp_path: Path
):
    bed.train(tmp_path / "run", *OWN, "steps=2", "checkpoint.every=5")
    initial, left = weights(bed.folder / "model"), weights(tmp_path / "run" / "hf")
    changed = {name for name, tensor in initial.items() if not torch.equal(tensor, left[name])}
    above = ("model.layers.5.", "model.norm.")
    assert changed == {name for name in initial if not name.startswith(above)}
    assert initial.keys() == left.keys()


def test_servers_of_other_weights_get_those_of_the_layers_that_the_actor_does_not_hold(
    bed: Bed, tmp_path: Path
):
    """What the server did not get would be seen when the full policy is first compared."""
    other = shutil.copytree(bed.folder / "model", tmp_path / "other")
    tensors = {name: 2 * tensor for name, tensor in weights(other).items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with fake_server(other, tmp_path / "log") as fake:
        servers = ["rollout.engine=sglang", f"servers.addresses=[{fake.url}]"]
        short = ["steps=2", "bupo.internal_steps=1", "checkpoint.export_hf=false"]
        lines = bed.train(tmp_path / "run", *OWN, *servers, *short, "evaluation.every=0")
    assert [f"{GAPS}_max_nats" in line for line in lines] == [False, True]
    assert lines[1][f"{GAPS}_max_nats"] < 1e-5


def test_an_actor_that_would_forget_what_was_trained_is_refused(bed: Bed, finished: Path):
    changed = ["steps=9", "bupo.internal_steps=9", "bupo.internal_layout.dp=2"]
    config = load_config(None, bed.settings(finished, *changed))
    with pytest.raises(InputError) as error:
        preflight(config, None)
    assert str(error.value) == (
        f"bupo.internal_layout: {finished / 'checkpoints' / 'step_000006'} has trained 6 layers, "
        "and the run would go on with an actor of the internal layer 5 alone; set "
        "bupo.internal_layout=null, or choose another run_dir"
    )


def test_a_layout_of_other_ranks_is_refused_before_anything_starts(bed: Bed, tmp_path: Path):
    done = run("train", *bed.settings(tmp_path, "bupo.internal_layout.dp=4"))
    assert done.code == 2
    assert done.err.startswith("error: bupo.internal_layout: tp 1 x cp 1 x pp 1 x dp 4: does not")


def test_its_checkpoints_become_whole_models_with_the_layers_that_wait(
    bed: Bed, own: Path, tmp_path: Path
):
    path, out = own / "checkpoints" / "step_000002", tmp_path / "hf"
    done = run("convert", "megatron-to-hf", "--megatron", path, "--out", out)
    assert done.code == 0, done.err
    before, after = weights(bed.folder / "model"), weights(out)
    assert before.keys() == after.keys()
    unchanged = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    waiting = {name for name in before if ".layers.5." in name} | {"model.norm.weight"}
    assert unchanged == waiting


def test_nor_are_they_converted_without_the_layers_that_wait(own: Path, tmp_path: Path):
    path = tmp_path / "step_000002"
    shutil.copytree(own / "checkpoints" / "step_000002", path)
    seal = json.loads((path / "run.json").read_text())
    seal["config"]["model.path"] = str(tmp_path / "gone")
    (path / "run.json").write_text(json.dumps(seal))
    done = run("convert", "megatron-to-hf", "--megatron", path, "--out", tmp_path / "hf")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {path}: layer 6: is not in a checkpoint of the internal ph")
