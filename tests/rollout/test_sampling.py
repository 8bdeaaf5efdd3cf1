from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_bupo.rollout.sampling import draw, uniforms

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0, 0.0, 1.5, -1.0])
ALMOST_ONE = 1 - 2**-53  # the largest number that a generator of doubles yields


def softmax(logits: torch.Tensor, temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def draw_many(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    rows = logits.expand(len(uniform), -1)
    return draw(rows, uniform, temperature=temperature, top_p=top_p).tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_as_frequent_as_the_softmax_says(temperature: float) -> None:
    uniform = torch.from_numpy(uniforms(seed=3, prompt=0, response=0, count=20_000))
    counts = draw_many(LOGITS, uniform, temperature=temperature).bincount(minlength=len(LOGITS))
    expected = 20_000 * torch.tensor(softmax(LOGITS, temperature))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    false_alarm = torch.special.gammaincc(torch.tensor((len(LOGITS) - 1) / 2), chi_square / 2)
    assert false_alarm > 1e-6


def test_streams_of_neighbours_are_uncorrelated() -> None:
    streams = [
        uniforms(seed=seed, prompt=prompt, response=response, count=4000)
        for seed in (0, 1)
        for prompt in (0, 1)
        for response in (0, 1)
    ]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)  # 28 pairs: false alarm below 2e-5


def test_a_stream_is_reproducible_and_begins_with_the_shorter_one() -> None:
    long = uniforms(seed=-1, prompt=5, response=2, count=50)
    assert (long == uniforms(seed=-1, prompt=5, response=2, count=50)).all()
    assert (long[:7] == uniforms(seed=-1, prompt=5, response=2, count=7)).all()
    assert (long != uniforms(seed=-2, prompt=5, response=2, count=50)).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logprobs_and_entropies_are_those_of_the_sampling_temperature(temperature: float) -> None:
    probs = softmax(LOGITS, temperature)
    entropy = -sum(p * math.log(p) for p in probs)
    drawn = draw(
        LOGITS.expand(50, -1),
        torch.linspace(0, ALMOST_ONE, 50, dtype=torch.double),
        temperature=temperature,
        top_p=0.6,
    )
    expected = torch.tensor([math.log(probs[token]) for token in drawn.tokens.tolist()])
    assert torch.allclose(drawn.logprobs, expected, atol=1e-6)
    assert torch.allclose(drawn.entropies, torch.full((50,), entropy), atol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.99])
def test_top_p_keeps_the_smallest_likeliest_set_and_its_proportions(top_p: float) -> None:
    probs = softmax(LOGITS, 1.0)
    nucleus: list[int] = []
    while sum(probs[token] for token in nucleus) < top_p:
        nucleus.append(max((t for t in range(8) if t not in nucleus), key=lambda t: probs[t]))
    mass = sum(probs[token] for token in nucleus)

    grid = (torch.arange(10_000, dtype=torch.double) + 0.5) / 10_000
    counts = draw_many(LOGITS, grid, top_p=top_p).bincount(minlength=8).tolist()
    for token in range(8):
        share = probs[token] / mass if token in nucleus else 0.0
        assert abs(counts[token] - 10_000 * share) <= 1


def test_an_impossible_token_is_never_drawn_not_even_at_the_ends() -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    ends = torch.tensor([0.0, ALMOST_ONE], dtype=torch.double)
    assert draw_many(logits, ends).tolist() == [1, 2]
    assert draw_many(logits, ends, top_p=0.9).tolist() == [1, 2]
    drawn = draw(logits.expand(2, -1), ends, temperature=1.0)
    assert torch.allclose(drawn.entropies, torch.tensor(math.log(2)))


def test_the_tail_of_a_large_vocabulary_is_reachable() -> None:
    vocab = 150_000
    quantiles = torch.tensor([0.1, 0.5, 0.9, 0.999999], dtype=torch.double)
    tokens = draw_many(torch.zeros(vocab), quantiles)
    assert (tokens - quantiles * vocab).abs().max() <= 1


def test_temperature_zero_takes_the_likeliest_token_and_reports_it_under_temperature_one() -> None:
    drawn = draw(LOGITS[None], torch.tensor([0.99]), temperature=0.0)
    assert drawn.tokens.tolist() == [2]
    assert math.isclose(drawn.logprobs.item(), math.log(softmax(LOGITS, 1.0)[2]), abs_tol=1e-6)
