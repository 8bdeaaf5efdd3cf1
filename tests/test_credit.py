"""Credit to planning tokens in a run: the dumped advantages against a second reading of the text.

The demo's tokens are characters, and its responses `>13>16#16$` running sums, so that grams like
`> 13` are a few tokens long and stand in some responses only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_bupo.bed.chain_sums import CHARACTERS
from megatron_bupo.data.packing import pack
from megatron_bupo.planning_credit import sampled_entropies
from tests.record.dumps import two_groups
from tests.runs import Bed, metrics

QUIET = ["evaluation.every=0", "checkpoint.every=10", "debug.dump_rollouts=true"]
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


def text_of(response: dict[str, Any]) -> str:
    return "".join(CHARACTERS[token] for token in response["response_ids"])


def planning(response: dict[str, Any], grams: Sequence[str] = GRAMS) -> list[bool]:
    """Which tokens are part of a gram, by a search for each."""
    text = text_of(response)
    plans = [False] * len(text)
    for gram in grams:
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "phases", "on"),
    [
        ("paper", "full", {3, 4, 5}),
        pytest.param("amplify", "both", {1, 2, 3, 4, 5}, marks=pytest.mark.slow),
    ],
)
def test_planning_tokens_learn_more_in_the_steps_that_are_asked_for(
    bed: Bed, grams: Path, tmp_path: Path, form: str, phases: str, on: set[int]
):
    more = [f"hicra.grams={grams}", f"hicra.form={form}", f"hicra.phases={phases}"]
    more.append("parallel.pp=2" if form == "paper" else "parallel.pp=1")
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


WATCHED = {"> 9": 1, ">": 1, "#": 1, "+": 2, "=": 2}  # grams and their clusters


def dumb_measures(lines: list[dict[str, Any]], full: bool) -> dict[str, float]:
    """What a step logs of its planning tokens, from what was dumped of it, token by token."""
    tokens = [
        token
        for line in lines
        for token in zip(
            planning(line, list(WATCHED)),
            line["old_logprobs" if full else "rollout_logprobs"],
            line["policy_entropies" if full else "entropies"],
            strict=True,
        )
    ]
    known = {"planning_tokens_fraction": fmean(plans for plans, *_ in tokens)}
    for kind, kept in (("planning", True), ("execution", False)):
        mine = [token for token in tokens if token[0] == kept]
        known[f"{kind}_entropy_nats"] = fmean(entropy for *_, entropy in mine)
        known[f"{kind}_perplexity"] = math.exp(-fmean(logprob for _, logprob, _ in mine))
    forks = sorted(tokens, key=lambda token: -token[2])[: round(0.3 * len(tokens))]
    both = sum(plans for plans, *_ in forks)
    known["planning_among_forks_fraction"] = both / len(forks)
    known["forks_among_planning_fraction"] = both / sum(plans for plans, *_ in tokens)
    return {f"hicra/{name}": value for name, value in (known | dumb_entropies(lines)).items()}


def dumb_entropies(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The spread of the grams, their clusters, and of the words after them."""

    def entropy(things: list[Any]) -> float:
        shares = [things.count(thing) / len(things) for thing in set(things)]
        return -sum(share * math.log(share) for share in shares)

    # A look ahead, for a word may begin with the next gram
    found = re.compile(r"(>9(?!\w)|[>#+=])(?=(\d+|.)?)")
    pairs = [match.groups() for line in lines for match in found.finditer(text_of(line))]
    grams = [gram.replace(">9", "> 9") for gram, _ in pairs]
    known = {"semantic_entropy_nats": entropy(grams)}
    known["semantic_cluster_entropy_nats"] = entropy([WATCHED[gram] for gram in grams])
    followed = [pair for pair in pairs if pair[1]]
    words = {gram: [word for g, word in followed if g == gram] for gram, _ in followed}
    known["following_entropy_nats"] = sum(
        len(after) / len(followed) * entropy(after) for after in words.values()
    )
    return known


@pytest.mark.slow
def test_a_run_that_only_watches_its_grams_trains_as_one_that_knows_none(bed: Bed, tmp_path: Path):
    grams = tmp_path / "grams.yaml"
    grams.write_text(json.dumps([{"gram": g, "cluster": c} for g, c in WATCHED.items()]))
    short = [*QUIET, "steps=4", "bupo.internal_steps=2"]
    plain_run = bed.train(tmp_path / "plain", *short)
    watching = [*short, f"hicra.grams={grams}", "hicra.alpha=0"]
    watched = bed.train(tmp_path / "watched", *watching)
    assert [without_hicra(record) for record in watched] == plain_run
    for step, known in enumerate(watched):
        lines = steps_of(tmp_path / "watched")[step]
        expected = dumb_measures(lines, full=known["policy"] == "full")
        assert {name: known[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert "hicra/credited_tokens_fraction" not in known
    assert (tmp_path / "watched" / "planning.png").exists()
    assert not (tmp_path / "plain" / "planning.png").exists()
    [sampled] = bed.train(tmp_path / "sampled", *watching, "steps=1", "debug.rollout_only=true")
    first = {name: value for name, value in watched[0].items() if name.startswith("hicra/")}
    assert {name: sampled[name] for name in first} == pytest.approx(first, rel=1e-4)


def without_hicra(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith("hicra/")}


@pytest.mark.slow
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


def test_entropies_that_the_engine_tells_stand_at_their_tokens_and_some_are_none():
    groups, _ = two_groups()
    batch = pack(groups, 0)
    entropies = sampled_entropies(batch, groups)
    assert entropies is not None
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for row, rollout in zip(entropies.tolist(), rollouts, strict=True):
        begin, end = 4, 4 + len(rollout.response_ids)
        assert row[begin:end] == pytest.approx(list(rollout.entropies or ()))
        assert not any([*row[:begin], *row[end:]])
    silent = replace(rollouts[1], entropies=None)
    untold = [replace(groups[0], rollouts=(rollouts[0], silent)), groups[1]]
    assert sampled_entropies(batch, untold) is None


@pytest.mark.slow
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
