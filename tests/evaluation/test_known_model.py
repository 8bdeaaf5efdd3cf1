"""Avg@k and Pass@k of a model whose chances are known, through the command line.

The scores of a right implementation are refused with a chance of at most 1e-6 per seed: six numbers
to a run, each at 1e-7, by the law of each number itself (`known_model.p_value`). The seed is fixed,
so a run that has passed passes again.
"""

from __future__ import annotations

import json
from fractions import Fraction
from math import prod
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from megatron_bupo.cli import main
from tests.evaluation.known_model import (
    RIGHT,
    Known,
    chances,
    correct_counts,
    count_law,
    make_known_model,
    p_value,
)

REFUSED = 1e-7
N, KS = 300, (1, 4, 16, 64, 256)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_known_model(tmp_path_factory.mktemp("known"))


def unbiased(k: int) -> list[float]:
    """Pass@k of each number of correct responses by its definition, in fractions."""
    missed = [
        prod((Fraction(max(N - correct - i, 0), N - i) for i in range(k)), start=Fraction(1))
        for correct in range(N + 1)
    ]
    return [float(1 - m) for m in missed]


PASS = {k: unbiased(k) for k in KS}


def settings(known: Known, *more: str) -> list[str]:
    return [
        f"evaluation.benchmarks=[{{name: known, data: {known.data}}}]",
        f"evaluation.responses_per_prompt={N}",
        f"evaluation.pass_at={[*KS]}",
        "evaluation.max_response_tokens=1",
        "data.max_prompt_tokens=1",
        f"reward.function={known.reward}",
        *more,
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_known_chances_come_out_as_avg_and_pass_at_k(
    known: Known, tmp_path: Path, temperature: float
):
    out = tmp_path / "out"
    own = settings(known, f"evaluation.temperature={temperature}")
    assert main(["eval", "--model", str(known.model), "--out", str(out), *own]) == 0
    found = json.loads((out / "results.json").read_text())["benchmarks"]["known"]
    right = chances(known, temperature=temperature)
    if temperature == 1:
        assert np.abs(right - RIGHT).max() < 1e-4
    avg, pass_at = found["avg_at_k"]["value"], found["pass_at_k"]
    means = [correct / N for correct in range(N + 1)]
    assert p_value(avg, right, means) > REFUSED
    for k in KS:
        # What is estimated is the chance of k fresh responses, without a bias
        expected = [count_law(p, N) @ PASS[k] for p in right]
        assert np.abs(np.array(expected) - (1 - (1 - right) ** k)).max() < 1e-12
        assert p_value(pass_at[str(k)]["value"], right, PASS[k]) > REFUSED
    for estimate in (found["avg_at_k"], *pass_at.values()):
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    counts = correct_counts(out / "known.jsonl")
    for k in KS:
        assert pass_at[str(k)]["value"] == pytest.approx(
            fmean(PASS[k][c] for c in counts), abs=1e-12
        )
    # The test can fail: by a temperature that is off by a fifth, by counting who has k correct ones
    assert p_value(avg, chances(known, temperature=temperature * 0.8), means) < REFUSED
    assert p_value(fmean(c >= 4 for c in counts), right, PASS[4]) < REFUSED
