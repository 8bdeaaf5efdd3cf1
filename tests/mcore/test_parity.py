"""The actor under every layout against transformers on one process, for every policy.

One fork per layout shows all that the layout can show: weights go in and come out bit-equal;
log-probs, entropies, loss, gradient norm and every gradient equal the reference's, each policy with
another advantage and loss, and HICRA's credit; a real update moves what the policy trains and
nothing else.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL
from tests.mcore.credited import ADVANTAGES, LOSSES
from tests.mcore.parity import EXACT, algorithms, measure, reference
from tests.mcore.parity_cases import CASES, Case
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.parity
# In bf16: times transformers' own largest deviation from fp32, over many numbers each; of a single
# number, such as the loss, either may be close by chance.
BF16_SLACK, BF16_MEASURED = 2.0, ("logprobs", "entropies", "grads")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[] if case.fast else [pytest.mark.slow, *[pytest.mark.wide] * case.wide],
        )
        for case in CASES
    ],
)
def test_every_policy_equals_the_dense_reference(case: Case, tiny_model_dir: Callable[..., Path]):
    model_dir = tiny_model_dir(**case.model)
    expected = reference(case, model_dir)
    for step in expected.steps.values():
        assert max(float(grad.abs().max()) for grad in step.exact.grads.values()) > 0.01
    exact = expected.allowed is EXACT
    slack, measured = (1.0, ()) if exact else (BF16_SLACK, BF16_MEASURED)
    for seen in run_ranks(case.ranks, measure, case, model_dir, expected):
        weights = expected.weights
        assert seen["weights"].keys() == weights.keys()
        assert all(torch.equal(seen["weights"][name], weights[name]) for name in weights)
        for kind, gaps in seen["gaps"].items():
            assert gaps.over(expected.allowed, *measured) < slack, (kind, gaps, expected.allowed)
        assert seen["replica gap"] == 0
        above = {n for n in weights if n == "model.norm.weight" or _layer_of(n) > 2}
        assert seen["moved"] == set(weights) - above == set(seen["sent"])
        assert all(torch.equal(seen["after"][n], sent) for n, sent in seen["sent"].items())


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "dp", "vpp", "ep"])
def test_every_advantage_meets_every_loss_on_every_kind_of_layout(axis: str):
    met = {kind: set() for kind in ("full", "internal")}
    for case in CASES:
        for policy, by in algorithms(case).items() if case.layout.get(axis, 1) > 1 else ():
            met["full" if policy == FULL else "internal"].add((by.advantage, by.loss))
    assert met["internal"] == set(product(ADVANTAGES, LOSSES))
    if axis in {"tp", "pp", "cp", "dp"}:
        advantages, losses = map(set, zip(*met["full"], strict=True))
        assert (advantages, losses) == (set(ADVANTAGES), set(LOSSES))


def _layer_of(name: str) -> int:
    """The layer that an HF tensor belongs to, counted from 1; 0 outside the layers."""
    return int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
