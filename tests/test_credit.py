"""Credit to planning tokens in a run: the dumped advantages against a second reading of the text.

The demo's tokens are characters, and its responses `>13>16#16$` running sums, so that grams like
`> 13` are a few tokens long and stand in some responses only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.bed.chain_sums import CHARACTERS
from tests.runs import Bed, metrics

QUIET = ["evaluation.every=0", "logging.tensorboard=false", "debug.dump_rollouts=true"]
GRAMS = ["> 1", "# 1", "1 >", "2 #", "+", "3 > 1"]


@pytest.fixture(scope="module")
def grams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grams") / "grams.yaml"
    path.write_text(json.dumps({"grams": [{"gram": gram} for gram in GRAMS]}))
    return path


def plain(lines: list[dict[str, Any]]) -> list[float]:
    """GRPO's advantages, response by response."""
    told = []
    for start in range(0, len(lines), 4):
        rewards = [line["reward"] for line in lines[start : start + 4]]
        mean = sum(rewards) / 4
        std = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
        told += [(r - mean) / (std + 1e-6) for r in rewards]
    return told


def planning(response: dict[str, Any]) -> list[bool]:
    """Which tokens are part of a gram, by a search for each."""
    text = "".join(CHARACTERS[token] for token in response["response_ids"])
    plans = [False] * len(text)
    for gram in GRAMS:
        words = [re.escape(word) for word in gram.split()]
        before = r"(?<!\w)" if gram[0].isdigit() else ""
        after = r"(?!\w)" if gram[-1].isdigit() else ""
        for found in re.finditer(rf"(?={before}({''.join(words)}){after})", text):
            for i in range(found.start(1), found.end(1)):
                plans[i] = True
    return plans


def steps_of(run_dir: Path) -> list[list[dict[str, Any]]]:
    files = sorted((run_dir / "rollouts").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def factors(lines: list[dict[str, Any]]) -> list[list[float]]:
    """What each token's advantage is, divided by its response's; 1 where that is 0."""
    return [
        [round(a / b, 4) if b else 1.0 for a in line["advantages"]]
        for line, b in zip(lines, plain(lines), strict=True)
    ]


@pytest.mark.parametrize(
    ("form", "phases", "on"),
    [("paper", "full", {3, 4, 5}), ("amplify", "both", {1, 2, 3, 4, 5})],
)
def test_planning_tokens_learn_more_in_the_steps_that_are_asked_for(
    bed: Bed, grams: Path, tmp_path: Path, form: str, phases: str, on: set[int]
):
    more = [f"hicra.grams={grams}", f"hicra.form={form}", f"hicra.phases={phases}"]
    bed.train(tmp_path, *QUIET, *more, f"hicra.from_step={min(on)}")
    some = 0
    for step, (lines, known) in enumerate(zip(steps_of(tmp_path), metrics(tmp_path), strict=True)):
        less = 0.8 if form == "paper" else 1.2
        tokens = []
        for line, found, base in zip(lines, factors(lines), plain(lines), strict=True):
            plans = [p and step in on for p in planning(line)]
            factor = 1.2 if base > 0 else less
            assert found == [factor if p and base else 1.0 for p in plans]
            tokens += plans
        if step in on:
            some += sum(tokens)
            share = known["hicra/credited_tokens_fraction"]
            assert share == pytest.approx(sum(tokens) / len(tokens))
        else:
            assert "hicra/credited_tokens_fraction" not in known
    assert some


def test_a_placebo_weighs_as_many_other_tokens_of_each_response(
    bed: Bed, grams: Path, tmp_path: Path
):
    settings = ["hicra.mask=placebo", "hicra.phases=both", "steps=4", f"hicra.grams={grams}"]
    bed.train(tmp_path, *QUIET, *settings)
    moved = 0
    for lines in steps_of(tmp_path):
        for line, found, base in zip(lines, factors(lines), plain(lines), strict=True):
            plans = planning(line)
            weighed = [factor != 1.0 for factor in found]
            if base:
                assert sum(weighed) == sum(plans)
                moved += weighed != plans
    assert moved


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_most_uncertain_tokens_are_those_of_the_full_policy_in_every_phase(
    bed: Bed, tmp_path: Path, minibatches: int
):
    settings = ["hicra.mask=entropy", "hicra.phases=both", "steps=4"]
    settings += [f"algorithm.minibatches={minibatches}"]
    bed.train(tmp_path, *QUIET, *settings)
    for lines in steps_of(tmp_path):
        entropies = [entropy for line in lines for entropy in line["entropies"]]  # the sampler's
        threshold = sorted(entropies, reverse=True)[round(0.3 * len(entropies)) - 1]
        for line, found, base in zip(lines, factors(lines), plain(lines), strict=True):
            for factor, entropy in zip(found, line["entropies"], strict=True):
                if base and abs(entropy - threshold) > 1e-5:
                    assert (factor != 1.0) == (entropy > threshold)
