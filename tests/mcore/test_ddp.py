"""What an internal phase does not train, it does not send, and nobody can tell by the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.checkpoints import checkpoint_dir
from megatron_bupo.mcore import checkpoint
from megatron_bupo.mcore.weight_stream import WeightStream, trained_units
from tests.mcore.actors import (
    another_trainer,
    random_batch,
    run_config,
    snapshot,
    start_trainer,
    with_stale_logprobs,
)
from tests.ranks import run_ranks
from tests.tiers import WIDE

pytestmark = pytest.mark.slow
BUCKET = 2000  # parameters: less than a layer
INTERNAL = InternalLayerPolicy(1)
UNTIED = {"family": "qwen3", "vocab": 67, "layers": 4}
TIED = UNTIED | {"tied": True}
EXPERTS = UNTIED | {"family": "qwen3_moe", "num_experts": 6}
OVERLAPPED_GRADS = {"overlap_grad_reduce": True}
OVERLAPPED = {**OVERLAPPED_GRADS, "overlap_param_gather": True}
DISTRIBUTED = {"distributed_optimizer": True}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir) -> Path:
    return tiny_model_dir(**TIED)


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


def _trace(model_dir: Path, parallel: dict, lr_factors: dict, megatron: dict) -> list[Tensor]:
    """What can be seen of a run up through the model, and of its return to where it was."""
    trainer = start_trainer(
        model_dir,
        run_config(
            parallel=parallel,
            megatron={"bucket_size": BUCKET, **megatron},
            optimizer={"lr_factors": lr_factors},
        ),
    )
    seen = []
    for policy in (INTERNAL, INTERNAL, InternalLayerPolicy(3), FULL, FULL, INTERNAL):
        for _ in range(2):  # the second finds parameters that only a forward pass asks for
            old, entropies = trainer.logprobs(random_batch(), policy)
            report = trainer.update(with_stale_logprobs(random_batch(), old), policy, lr=1e-3)
            loss, norm = report.metrics["update/loss"], report.metrics["update/grad_norm"]
            seen += [old, entropies, torch.tensor([loss, norm])]
        seen += [tensor.clone() for _, tensor in trainer.changed_weights(policy)]
    return [*seen, trainer.logprobs(random_batch(), FULL)[0]]


@pytest.mark.parametrize(
    ("model", "parallel", "frozen", "megatron"),
    [
        (TIED, {"dp": 2}, {}, OVERLAPPED_GRADS),
        (TIED, {"dp": 2, **DISTRIBUTED}, {"2": 0.0, "embedding": 0.0}, OVERLAPPED),
        pytest.param(TIED, {"dp": 2, "pp": 2, **DISTRIBUTED}, {}, OVERLAPPED, marks=WIDE),
        pytest.param(
            UNTIED,
            {"dp": 2, "pp": 2, "vpp": 2, **DISTRIBUTED},
            {"1": 0.0},
            OVERLAPPED | {"align_param_gather": True},
            marks=WIDE,
        ),
        pytest.param(EXPERTS, {"dp": 4, "ep": 2, **DISTRIBUTED}, {}, OVERLAPPED, marks=WIDE),
    ],
)
def test_an_exchange_that_overlaps_with_the_passes_changes_no_bit(
    tiny_model_dir, model: dict, parallel: dict, frozen: dict, megatron: dict
):
    directory, ranks = tiny_model_dir(**model), parallel["dp"] * parallel.get("pp", 1)
    expected, *_ = run_ranks(ranks, _trace, directory, parallel, frozen, {})
    for got in run_ranks(ranks, _trace, directory, parallel, frozen, megatron):
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


def _under_way(model_dir: Path) -> list[list[bool]]:
    """At the end of each update's backward pass: is the exchange of a bucket under way?"""
    config = run_config(parallel={"dp": 2}, megatron={"bucket_size": BUCKET, **OVERLAPPED_GRADS})
    trainer = start_trainer(model_dir, config)
    (chunk,), seen = trainer.wrapped, []
    finish = chunk.finish_grad_sync

    def looking(*args, **kwargs):
        seen.append([group.grad_reduce_handle is not None for group in chunk.bucket_groups])
        finish(*args, **kwargs)

    chunk.finish_grad_sync = looking
    for policy in (INTERNAL, INTERNAL, INTERNAL, FULL, FULL):
        old, _ = trainer.logprobs(random_batch(), policy)
        trainer.update(random_batch().with_old_logprobs(old), policy, lr=1e-3)
    return seen


def test_trained_buckets_are_under_way_before_the_backward_pass_ends(model_dir: Path):
    internal, full = [False, False, False, True, True], [True] * 5  # 4 layers, and the embedding
    at_first, switched = [False] * 5, [False] * 4 + [True]  # where what is trained is another
    for seen in run_ranks(2, _under_way, model_dir):
        assert seen == [at_first, internal, internal, switched, full]


def _sent_elements(model_dir: Path, parallel: dict, least: int) -> list[tuple[int, int]]:
    """Elements that this rank's gradient exchange sends, and those of its trained parameters, for
    every internal layer policy and the full one.
    """
    config = run_config(parallel=parallel, megatron={"bucket_size": least})
    trainer = start_trainer(model_dir, config)
    (chunk,), sent, all_reduce = trainer.wrapped, [], torch.distributed.all_reduce

    def counting(tensor: Tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    counts = []
    for policy in (*map(InternalLayerPolicy, range(1, trainer.arch.layers)), FULL):
        units = {"tied unembedding", *trained_units(policy, trainer.arch)}
        assert isinstance(trainer.weights, WeightStream)
        held = [part for unit in units for part in trainer.weights.held.get(unit, [])]
        trained = {part.parameter for part in held}
        sent.clear()
        chunk.train_only(trained)
        torch.distributed.all_reduce = counting
        chunk.finish_grad_sync()
        torch.distributed.all_reduce = all_reduce
        counts.append((sum(sent), sum(p.numel() for p in trained)))
    return counts


@pytest.mark.parametrize(
    ("model", "parallel", "beyond"),
    [
        (UNTIED, {"dp": 2}, 32),
        (TIED, {"dp": 2, "pp": 2}, 32),
        (UNTIED, {"dp": 2, "pp": 2}, 32),
        (EXPERTS, {"dp": 4, "ep": 2}, 32 + 2 * 2304),  # a bucket of two experts
    ],
)
def test_on_every_stage_an_exchange_sends_what_is_trained_and_a_norm(
    tiny_model_dir, model: dict, parallel: dict, beyond: int
):
    """The norm after the last layer shifts the buckets' ends by its own size; experts, in buckets
    of their own, may end within a layer.
    """
    ranks = parallel["dp"] * parallel.get("pp", 1)
    for counts in run_ranks(ranks, _sent_elements, tiny_model_dir(**model), parallel, BUCKET):
        for sent, trained in counts:
            assert trained <= sent <= trained + beyond
        assert counts[-1][0] == counts[-1][1]


def test_a_bucket_has_as_many_layers_as_hold_what_was_asked_for(model_dir: Path):
    layer = 7760
    (one, *_), (two, *_) = (
        run_ranks(2, _sent_elements, model_dir, {"dp": 2}, least) for least in (layer, layer + 1)
    )
    (first, second, third, fourth), paired = (sent for sent, _ in one), [sent for sent, _ in two]
    assert first < second < third < fourth
    assert paired == [second, second, fourth, fourth]


def _weights_after_a_restart(model_dir: Path, run_dir: Path) -> tuple[dict, dict]:
    """Weights after two updates: without a break, and with a checkpoint between."""
    overlapped = {"bucket_size": BUCKET, **OVERLAPPED}
    config = run_config(parallel={"dp": 2, "pp": 2, **DISTRIBUTED}, megatron=overlapped)
    trainer = start_trainer(model_dir, config)
    batch = random_batch()
    trainer.update(batch, INTERNAL, lr=1e-3)
    checkpoint.save(trainer, run_dir, 1, {}, keep=1)
    trainer.update(batch, FULL, lr=1e-3)
    restarted = another_trainer(model_dir, config)
    checkpoint.load(restarted, checkpoint_dir(run_dir, 1))
    restarted.update(batch, FULL, lr=1e-3)
    return snapshot(trainer), snapshot(restarted)


def test_a_checkpoint_of_many_buckets_restores_every_shard(model_dir: Path, tmp_path: Path):
    """Where there is padding between them, as on the first stage here."""
    for expected, got in run_ranks(4, _weights_after_a_restart, model_dir, tmp_path):
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
