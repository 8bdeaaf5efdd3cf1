"""Experts: who reads and sends which, in what portions; and the loss that balances them.

That they compute what transformers computes, under every layout, is in the parity matrix.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.hf_weights import units
from megatron_bupo.mcore.weight_stream import WeightStream, parcels
from tests.dense import by_hf_name, dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    full_gradients,
    random_batch,
    run_config,
    start_trainer,
    with_stale_logprobs,
)
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config.schema import Config
    from megatron_bupo.types import TokenBatch

pytestmark = pytest.mark.parity

MODEL = {"family": "qwen3_moe", "vocab": 67, "scale": 0.12, "num_experts": 6}
INTERNAL = InternalLayerPolicy(2)
COEFFICIENT = 0.7


def _reads_and_sends(model_dir: Path) -> tuple[set[str], dict[str, Tensor], list[int]]:
    """What this rank reads; what it streams an expert of each rank at a time; the most experts in
    any portion.
    """
    config = run_config(parallel={"pp": 2, "dp": 2, "ep": 2})
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    read = set()
    with ExitStack() as files:
        open_slice = slice_opener(read_index(model_dir), files)

        def noting(name: str) -> Any:
            read.add(name)
            return open_slice(name)

        actor = MegatronActor(read_architecture(model_dir), config, noting)
    arch = read_architecture(model_dir)
    stream = WeightStream(actor.gpt_chunks, arch, torch.float32, parcel_bytes=1)
    portions = [len({row.expert for row in p}) for u in units(arch) for p in parcels(u, arch, 1)]
    return read, {name: t.clone() for name, t in stream.tensors(units(arch))}, portions


def test_a_rank_reads_its_own_experts_and_streams_all_a_few_at_a_time(
    tiny_model_dir: Callable[..., Path],
):
    model_dir = tiny_model_dir(**MODEL)
    stored = load_file(model_dir / "model.safetensors")
    read: dict[int, set[str]] = {}
    for rank, (names, sent, portions) in enumerate(run_ranks(4, _reads_and_sends, model_dir)):
        assert sent.keys() == stored.keys()
        assert all(torch.equal(sent[name], stored[name]) for name in stored)
        assert max(portions) == 2  # one of each rank that shares them
        read[rank] = {name for name in names if ".experts." in name}
    # Ranks 0 and 1 are the first stage, 2 and 3 the second.
    experts = [name for name in stored if ".experts." in name]
    for rank, names in read.items():
        stage, holder = divmod(rank, 2)
        of_rank = {
            name
            for name in experts
            if int(name.split(".")[2]) // 2 == stage and int(name.split(".")[5]) // 3 == holder
        }
        assert names == of_rank


def _balanced(
    model_dir: Path, config: Config, batch: TokenBatch, policy: Policy
) -> tuple[dict[str, Tensor], float, dict[int, float]]:
    trainer = start_trainer(model_dir, config)
    metrics = trainer.update(batch, policy, lr=0.0).metrics
    seen = {int(router.layer_number or 0): float(router.imbalance) for router in trainer.routers}
    return full_gradients(trainer), metrics["update/expert_imbalance"], seen


def _dense_balance(model: Any, batch: TokenBatch, layers: int, groups: list[list[int]]) -> Tensor:
    """The load-balancing loss of the lowest `layers`, summed over them; over the tokens of each
    group of responses, and the mean of these by tokens.
    """
    logits = model(batch.input_ids, output_router_logits=True).router_logits
    ends = [int(m.nonzero().max()) if m.any() else 0 for m in batch.response_mask]
    loss = torch.zeros(())
    for layer in logits[:layers]:
        scores = layer.view(*batch.input_ids.shape, -1).softmax(-1)
        for group in groups:
            mine = torch.cat([scores[i, : ends[i]] for i in group])
            chosen = mine.topk(2).indices
            experts = mine.shape[-1]
            shares = torch.stack(
                [(chosen == e).float().sum() / chosen.numel() for e in range(experts)]
            )
            balance = experts * (shares * mine.mean(0)).sum()
            loss = loss + balance * len(mine) / sum(ends)
    return loss


ALL_TOGETHER = {"trainer": {"microbatch_size": None}}
EACH_ALONE = {"trainer": {"microbatch_size": 1}}


@pytest.mark.parametrize(
    ("ranks", "layout", "cut"),
    [
        pytest.param(1, {}, ALL_TOGETHER, id="one micro-batch"),
        pytest.param(1, {}, EACH_ALONE, id="a response each"),
        pytest.param(3, {"dp": 3, "ep": 3}, EACH_ALONE, id="EP3, some micro-batches are empty"),
        pytest.param(
            4,
            {"tp": 2, "sp": True, "pp": 2, "ep": 2, "etp": 1},
            EACH_ALONE,
            id="TP2 SP PP2 EP2",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"cp": 2}, ALL_TOGETHER, id="CP2"),
    ],
)
@pytest.mark.parametrize("policy", [FULL, INTERNAL], ids=str)
def test_experts_are_balanced_over_the_tokens_of_a_minibatch_and_up_to_the_target(
    ranks: int,
    layout: dict[str, Any],
    cut: dict[str, Any],
    policy: Policy,
    tiny_model_dir: Callable[..., Path],
):
    """Rows are padded under all of these layouts but the first: padding is not counted."""
    model_dir, batch = tiny_model_dir(**MODEL), random_batch()
    model = dense_model(model_dir)
    logprobs, _ = dense_logprobs(model, batch, policy)
    batch = with_stale_logprobs(batch, logprobs.detach())
    plain = dense_update(model, batch, policy).grads
    layers = 2 if policy == INTERNAL else 4
    each = [[i] for i in range(len(batch)) if batch.response_mask[i].any()]
    together = [[i for [i] in each]]
    balance = _dense_balance(model, batch, layers, each if cut is EACH_ALONE else together)
    (COEFFICIENT * balance).backward()
    expected = by_hf_name((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    differ = [n for n in expected if float((expected[n] - plain[n]).abs().max()) > 1e-3]
    assert sum(name.endswith("mlp.gate.weight") for name in differ) == layers

    config = run_config(parallel=layout, megatron={"moe_aux_loss_coeff": COEFFICIENT}, **cut)
    for grads, imbalance, by_layer in run_ranks(ranks, _balanced, model_dir, config, batch, policy):
        for name, grad in grads.items():
            wanted = expected.get(name, torch.zeros_like(grad))
            assert float((grad - wanted).abs().max()) < 1e-6, name
        assert imbalance == pytest.approx(balance.item() / layers, abs=1e-6)
        assert all((seen == 0) == (layer > layers) for layer, seen in by_layer.items())
