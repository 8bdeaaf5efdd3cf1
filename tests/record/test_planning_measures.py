"""What a step with strategic grams logs, against loops over its tokens."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch

from megatron_bupo.algorithm.planning_measures import Planning, Use
from megatron_bupo.record.measures import planning_measures

USES = [Use("wait", "so"), Use("so we", None), Use("hold on", "a"), Use("wait", "let")]
SAME = {"wait": 3, "hold on": 3}


def measured(planning: torch.Tensor, mask: torch.Tensor, **more: object) -> dict[str, float]:
    known = {"clusters": {}, "fork_share": 0.3, "entropies": torch.rand(mask.shape), "uses": USES}
    known |= {"logprobs": -torch.rand(mask.shape)} | more
    uses, logprobs, entropies = (known.pop(name) for name in ("uses", "logprobs", "entropies"))
    return planning_measures(Planning(planning, uses), mask, logprobs, entropies, **known)


def test_tokens_are_measured_by_what_they_do():
    mask = torch.rand(6, 12) < 0.8
    planning = (torch.rand(6, 12) < 0.3) & mask
    logprobs, entropies = -torch.rand(6, 12), torch.rand(6, 12)
    tokens = [
        (bool(planning[i, t]), float(logprobs[i, t]), float(entropies[i, t]))
        for i in range(6)
        for t in range(12)
        if mask[i, t]
    ]
    known = measured(planning, mask, logprobs=logprobs, entropies=entropies)
    for kind, plans in (("planning", True), ("execution", False)):
        mine = [token for token in tokens if token[0] == plans]
        mean = fmean(entropy for *_, entropy in mine)
        assert known[f"hicra/{kind}_entropy_nats"] == pytest.approx(mean)
        perplexity = math.exp(-fmean(logprob for _, logprob, _ in mine))
        assert known[f"hicra/{kind}_perplexity"] == pytest.approx(perplexity)
    forks = sorted(tokens, key=lambda token: -token[2])[: round(0.3 * len(tokens))]
    both, plan = sum(fork[0] for fork in forks), sum(token[0] for token in tokens)
    assert known["hicra/forks_among_planning_fraction"] == pytest.approx(both / plan)
    assert known["hicra/planning_among_forks_fraction"] == pytest.approx(both / len(forks))
    assert known["hicra/planning_tokens_fraction"] == pytest.approx(plan / len(tokens))
    some = [any(planning[i, t] for t in range(12)) for i in range(6)]
    assert known["hicra/planning_responses_fraction"] == pytest.approx(fmean(some))


def test_where_the_most_uncertain_tokens_plan_the_overlap_is_whole_both_ways():
    planning = torch.arange(20).reshape(2, 10) % 4 == 1
    entropies = torch.rand(2, 10) + planning
    mask = torch.ones_like(planning)
    known = measured(planning, mask, entropies=entropies, fork_share=0.25)
    assert known["hicra/forks_among_planning_fraction"] == 1.0
    assert known["hicra/planning_among_forks_fraction"] == 1.0


def test_grams_that_mean_the_same_are_one_and_one_without_a_cluster_is_its_own():
    mask = torch.ones(1, 4, dtype=torch.bool)
    known = measured(mask, mask, clusters=SAME)
    quarter, half = math.log(4) / 4, math.log(2) / 2
    assert known["hicra/grams_found_count"] == 4
    assert known["hicra/grams_distinct_count"] == 3
    assert known["hicra/semantic_entropy_nats"] == pytest.approx(half + 2 * quarter)
    expected = -0.75 * math.log(0.75) + quarter
    assert known["hicra/semantic_cluster_entropy_nats"] == pytest.approx(expected)
    # of the three that a word follows, two are "wait", once before "so" and once before "let"
    assert known["hicra/following_entropy_nats"] == pytest.approx(2 / 3 * math.log(2))


def test_what_is_not_known_is_left_out():
    mask = torch.ones(2, 5, dtype=torch.bool)
    none, some = torch.zeros_like(mask), torch.arange(10).reshape(2, 5) < 3
    known = measured(some, mask, entropies=None)
    assert "hicra/planning_perplexity" in known
    unknown = ("planning_entropy_nats", "execution_entropy_nats", "forks_among_planning_fraction")
    unknown += ("planning_among_forks_fraction", "semantic_cluster_entropy_nats")
    assert not {f"hicra/{name}" for name in unknown} & known.keys()
    nothing = measured(none, mask, uses=[])
    assert nothing["hicra/planning_tokens_fraction"] == nothing["hicra/grams_found_count"] == 0
    assert nothing["hicra/planning_among_forks_fraction"] == 0
    unknown = ("planning_perplexity", "planning_entropy_nats", "semantic_entropy_nats")
    unknown += ("forks_among_planning_fraction", "following_entropy_nats")
    assert not {f"hicra/{name}" for name in unknown} & nothing.keys()
    assert measured(none, none) == {}
