"""Whole runs that are held to the model they began with, and runs with one update a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import Bed

SHORT = (
    "steps=4",
    "bupo.internal_steps=2",
    "checkpoint.every=3",
    "evaluation.every=0",
    "data.eval=null",
    "algorithm.minibatches=1",
)
PASSES = {"time/old_logprobs_s", "time/ref_logprobs_s"}


def passes(run_dir: Path) -> list[set[str]]:
    """The passes before the update, by what each step took time for."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [PASSES & json.loads(line).keys() for line in lines]


def assert_measured(lines: list[dict[str, Any]]) -> None:
    """The internal policy's entropy; and that trainer and engine agree on the full policy, in the
    internal phase at its start alone.
    """
    assert ["entropy/internal_nats" in line for line in lines] == [True, True, False, False]
    gaps = [line.get("rollout/logprob_gap_max_nats", 1.0) for line in lines]
    assert [gap < 1e-5 for gap in gaps] == [True, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "estimator", "passed"),
    [("loss", "k3", {"time/ref_logprobs_s"}), ("reward", "k1", PASSES)],
)
def test_a_run_that_goes_on_keeps_the_reference_that_it_began_with(
    bed: Bed, tmp_path: Path, place: str, estimator: str, passed: set[str]
):
    kl = [f"algorithm.kl_in={place}", f"algorithm.kl_estimator={estimator}"]
    kl = [*SHORT, *kl, "algorithm.kl_coefficient=0.3"]
    lines = bed.train(tmp_path / "whole", *kl)
    bed.train(tmp_path / "parts", *kl, "steps=3")
    assert bed.train(tmp_path / "parts", *kl) == lines
    one, other = (load_file(tmp_path / p / "hf/model.safetensors") for p in ("whole", "parts"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    measured = [line["update/kl_to_reference_nats"] for line in lines]
    assert measured[0] == pytest.approx(0, abs=1e-9)  # nothing is trained yet
    assert all(abs(value) > 1e-6 for value in measured[1:])
    assert all(line["rollout/reward_mean"] * 16 in range(17) for line in lines)  # as graded
    assert passes(tmp_path / "whole") == [passed] * 4
    assert_measured(lines)


@pytest.mark.slow
def test_one_update_a_step_needs_no_pass_before_it_and_measures_the_same(bed: Bed, tmp_path: Path):
    lines = bed.train(tmp_path, *SHORT)
    assert passes(tmp_path) == [set()] * 4
    assert [line["update/ratio_mean"] for line in lines] == [1.0] * 4
    assert all("update/kl_to_reference_nats" not in line for line in lines)
    assert_measured(lines)
