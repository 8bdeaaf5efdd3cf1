"""What an internal phase does not train, it does not send, and nobody can tell by the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.mcore.weight_stream import trained_units
from tests.mcore.actors import random_batch, run_config, start_trainer, with_stale_logprobs
from tests.ranks import run_ranks

BUCKET = 2000  # parameters: several buckets to a layer
INTERNAL = InternalLayerPolicy(1)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir) -> Path:
    return tiny_model_dir(family="qwen3", vocab=67, layers=4)


def _updated_weights(model_dir: Path, parallel: dict, megatron: dict) -> dict[str, Tensor]:
    """Weights after two updates in the internal phase and one after it."""
    trainer = start_trainer(model_dir, run_config(parallel=parallel, megatron=megatron))
    for policy in (INTERNAL, INTERNAL, FULL):
        old, _ = trainer.logprobs(random_batch(), policy)
        trainer.update(with_stale_logprobs(random_batch(), old), policy, lr=1e-3)
    return {name: tensor.clone() for name, tensor in trainer.all_weights()}


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_replicas_that_leave_buckets_out_learn_as_one_rank_does(
    model_dir: Path, distributed_optimizer: bool
):
    parallel = {"dp": 2, "distributed_optimizer": distributed_optimizer}
    megatron = {"bucket_size": BUCKET}
    (expected,) = run_ranks(1, _updated_weights, model_dir, {}, {})
    for got in run_ranks(2, _updated_weights, model_dir, parallel, megatron):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def _sent_elements(model_dir: Path) -> dict[str, int]:
    """Elements that a gradient reduction sends, by policy, and those that the policy trains."""
    config = run_config(parallel={"dp": 2}, megatron={"bucket_size": BUCKET})
    trainer = start_trainer(model_dir, config)
    sent, all_reduce = [], torch.distributed.all_reduce

    def counting(tensor: Tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    (chunk,), counts = trainer.wrapped, {}
    for name, policy in {"internal": INTERNAL, "full": FULL}.items():
        units = trained_units(policy, trainer.arch)
        trained = {held.parameter for unit in units for held in trainer.weights.held[unit]}
        sent.clear()
        torch.distributed.all_reduce = counting
        with chunk.exchanging_only(trained):
            chunk.finish_grad_sync()
        torch.distributed.all_reduce = all_reduce
        counts |= {name: sum(sent), f"{name} trained": sum(p.numel() for p in trained)}
    return counts


def test_a_reduction_sends_what_is_trained_and_at_most_a_bucket_more(model_dir: Path):
    counts = run_ranks(2, _sent_elements, model_dir)[0]
    assert counts["full"] == counts["full trained"]
    beyond = counts["internal"] - counts["internal trained"]
    largest_parameter = 2 * 32 * 48  # gate and up; a bucket ends with the one that fills it
    assert 0 <= beyond <= BUCKET + largest_parameter
    assert counts["internal"] < counts["full"] / 2
