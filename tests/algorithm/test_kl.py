from __future__ import annotations

import math

import pytest
import torch

from megatron_bupo.algorithm.kl import kl_estimates

ESTIMATORS = ("k1", "k2", "k3")


def _one_token(logprob: float, ref: float, estimator: str) -> tuple[float, float]:
    """Schulman's formula, and its derivative by the log-prob."""
    r = math.exp(ref - logprob)
    return {
        "k1": (-math.log(r), 1.0),
        "k2": (math.log(r) ** 2 / 2, -math.log(r)),
        "k3": (r - 1 - math.log(r), 1 - r),
    }[estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_and_their_gradients_equal_a_loop_over_tokens(estimator: str):
    logprobs, ref = (-5 * torch.rand(200)).requires_grad_(), -5 * torch.rand(200)
    estimates = kl_estimates(logprobs, ref, estimator=estimator)
    estimates.sum().backward()
    tokens = zip(logprobs.tolist(), ref.tolist(), strict=True)
    values, slopes = zip(*(_one_token(p, q, estimator) for p, q in tokens), strict=True)
    assert logprobs.grad is not None
    assert estimates.tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-6)


def test_on_average_the_gradients_are_what_the_docstring_says():
    """Every token of a small vocabulary, weighed by its probability, against autograd on the KL."""
    logits, ref_logits = torch.randn(2, 7, dtype=torch.float64)
    logits.requires_grad_()
    log_p, log_ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    p = log_p.exp().detach()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def of(estimator: str) -> torch.Tensor:
        return gradient(p @ kl_estimates(log_p, log_ref, estimator=estimator))

    def in_reward(estimator: str) -> torch.Tensor:
        kl = kl_estimates(log_p, log_ref, estimator=estimator).detach()
        return gradient(p @ (kl * log_p))

    reverse = gradient(log_p.exp() @ (log_p - log_ref))
    forward = gradient(log_ref.exp() @ (log_ref - log_p))
    assert (reverse - forward).abs().max() > 0.05
    torch.testing.assert_close(of("k1"), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(of("k2"), reverse)
    torch.testing.assert_close(of("k3"), forward)
    torch.testing.assert_close(in_reward("k1"), reverse)
    assert all((in_reward(biased) - reverse).abs().max() > 0.01 for biased in ("k2", "k3"))


def test_a_small_kl_keeps_its_digits():
    """r - 1 - log r, computed as written, would leave nothing of it in fp32."""
    logprobs = torch.tensor([-2.0])
    step = 2.0**-12
    [k3] = kl_estimates(logprobs, logprobs + step, estimator="k3").tolist()
    assert k3 == pytest.approx(math.expm1(step) - step, rel=1e-3)


def test_a_token_that_the_reference_finds_far_likelier_stays_finite():
    logprobs = torch.tensor([-200.0, -0.1], requires_grad=True)
    ref = torch.tensor([-0.1, -200.0])
    estimates = kl_estimates(logprobs, ref, estimator="k3")
    estimates.sum().backward()
    assert logprobs.grad is not None
    assert estimates.tolist() == pytest.approx([math.exp(20) - 21, 198.9], rel=1e-5)
    assert logprobs.grad.tolist() == [0.0, 1.0]


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimates(torch.zeros(1), torch.zeros(1), estimator="k4")
