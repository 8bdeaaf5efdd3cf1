from __future__ import annotations

import pytest
import torch

from megatron_bupo.algorithm.hicra import displaced, most_uncertain, planning_advantages


def case(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape), torch.rand(*shape) < 0.4


@pytest.mark.parametrize("form", ["paper", "amplify"])
def test_each_token_gets_what_the_formula_says(form: str):
    advantages, planning = case(7, 11)
    credited = planning_advantages(advantages, planning, alpha=0.2, form=form)
    for a, plans, got in zip(
        advantages.flatten().tolist(),
        planning.flatten().tolist(),
        credited.flatten().tolist(),
        strict=True,
    ):
        less = 0.8 if form == "paper" else 1.2
        factor = (1.2 if a > 0 else less) if plans else 1.0
        assert got == pytest.approx(factor * a, rel=1e-6)


def test_the_paper_blames_a_failure_that_plans_less_and_amplifying_blames_it_more():
    a, plans = torch.tensor([[-1.0]]), torch.tensor([[True]])
    assert planning_advantages(a, plans, form="paper").item() == pytest.approx(-0.8)
    assert planning_advantages(a, plans, form="amplify").item() == pytest.approx(-1.2)


def test_no_planning_tokens_or_no_alpha_is_the_advantage_to_the_bit():
    advantages, planning = case(5, 9)
    nothing = torch.zeros_like(planning)
    assert torch.equal(planning_advantages(advantages, nothing, alpha=0.7), advantages)
    assert torch.equal(planning_advantages(advantages, planning, alpha=0.0), advantages)


def test_a_placebo_keeps_the_number_of_planning_tokens_and_their_runs_and_moves_all_of_them():
    response = torch.zeros(40, 30, dtype=torch.bool)
    for i in range(40):
        response[i, i % 5 : i % 5 + 2 + i // 2] = True
    planning = (torch.rand(40, 30) < 0.3) & response
    moved = displaced(planning, response, seed=3)
    assert torch.equal(moved, displaced(planning, response, seed=3))
    assert not torch.equal(moved, displaced(planning, response, seed=4))
    assert not (moved & ~response).any()
    for before, after, mask in zip(planning, moved, response, strict=True):
        ring, turned = before[mask].tolist(), after[mask].tolist()
        turns = [ring[-by:] + ring[:-by] for by in range(1, len(ring))]
        assert turned in turns


def test_a_placebo_of_empty_and_one_token_responses_is_as_long():
    response = torch.tensor([[False, False], [True, False]])
    assert torch.equal(displaced(response, response, seed=0), response)


def test_the_most_uncertain_tokens_are_those_of_the_highest_entropies_of_the_batch():
    entropies, response = torch.rand(6, 10), torch.rand(6, 10) < 0.6
    chosen = most_uncertain(entropies, response, share=0.3)
    values = sorted(entropies[response].tolist(), reverse=True)
    count = round(0.3 * len(values))
    assert sorted(entropies[chosen].tolist(), reverse=True) == values[:count]
    assert not (chosen & ~response).any()
