"""`bupo.target_layer=auto`: analysed once, before step 0, and trained as the number it came to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_bupo.auto_layer import chosen_before
from megatron_bupo.config import load_config
from megatron_bupo.errors import InputError
from tests.runs import Bed, Done, metrics, run, run_as_ranks

AUTO = "bupo.target_layer=auto"


def train(bed: Bed, run_dir: Path, *more: str) -> Done:
    return run("train", *bed.settings(run_dir), AUTO, "bupo.auto_prompts=3", *more)


@pytest.mark.slow
def test_a_run_trains_the_layer_that_its_analysis_recommends_and_keeps_it(bed: Bed, tmp_path: Path):
    run_dir = tmp_path / "run"
    done = train(bed, run_dir, "steps=1", "checkpoint.every=1")
    assert (done.code, done.err) == (0, "")
    path = run_dir / "analysis" / "analysis.json"
    analysis = json.loads(path.read_text())
    layer = analysis["recommendation"]["target_layer"]
    assert analysis["data"]["responses"] <= 3
    assert analysis["recommendation"]["reason"] in done.out
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["bupo"]["target_layer"] == layer
    assert f"internal layer {layer}" in done.out

    other = 1 if layer != 1 else 2
    analysis["recommendation"]["target_layer"] = other
    path.write_text(json.dumps(analysis))
    again = train(bed, run_dir, "steps=2", "checkpoint.every=1")
    assert (again.code, again.err) == (0, "")
    assert f"{AUTO}: layer {other}, by {path}" in again.out
    assert f"internal layer {other}" in again.out
    assert "sampling" not in again.out


@pytest.mark.slow
def test_ranks_of_torchrun_analyze_and_then_train_as_if_they_had_been_told(
    bed: Bed, tmp_path: Path
):
    auto = [AUTO, "bupo.auto_prompts=3", "steps=2"]
    for done in run_as_ranks(2, "train", *bed.settings(tmp_path / "auto", *auto)):
        assert done.code == 0, done.err
    analysis = json.loads((tmp_path / "auto" / "analysis" / "analysis.json").read_text())
    told = f"bupo.target_layer={analysis['recommendation']['target_layer']}"
    assert bed.train(tmp_path / "told", told, "steps=2") == metrics(tmp_path / "auto")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["bupo.target_layer=six"], "bupo.target_layer=six: is no layer"),
        ([AUTO, "bupo.auto_prompts=0"], "bupo.auto_prompts=0: is out of range"),
        ([AUTO, "bupo.internal_steps=1000", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_the_analysis(
    bed: Bed, tmp_path: Path, settings: list[str], reason: str
):
    done = run("train", *bed.settings(tmp_path / "run"), *settings)
    assert done.code == 2
    assert reason in done.err
    assert not (tmp_path / "run" / "analysis").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"recommendation": {}}', '{"recommendation": null}']
)
def test_an_analysis_without_a_layer_is_refused(tmp_path: Path, content: str):
    config = load_config(None, ["model.path=x", "data.train=x", f"run_dir={tmp_path}", AUTO])
    assert chosen_before(config) is None
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "analysis.json").write_text(content)
    with pytest.raises(InputError, match="target_layer=auto"):
        chosen_before(config)
