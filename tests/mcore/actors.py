"""A trainer on this rank of `tests.ranks.run_ranks`, something to train it on, and a look inside.

The process group belongs to the forked worker: pytest's own process must never join one, or the
next fork inherits gloo's threads half dead.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.schema import (
    AlgorithmConfig,
    BupoConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
)
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.learner import LearningModel
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.mcore.weight_stream import trained_units
from megatron_bupo.types import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy

_SECTIONS = {
    "model": ModelConfig,
    "algorithm": AlgorithmConfig,
    "bupo": BupoConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "trainer": TrainerConfig,
}


def run_config(**sections: Mapping[str, Any]) -> Config:
    """A config from plain mappings, `run_config(parallel={"tp": 2}, megatron={...})`.

    Micro-batches of 2 and logits of 5 rows at a time, so that a small batch meets every boundary;
    gradients are not clipped unless asked for.
    """
    values: dict[str, Any] = {
        **sections,
        "trainer": {
            "microbatch_size": 2,
            "logprob_chunk_tokens": 5,
            **sections.get("trainer", {}),
        },
        "optimizer": {"lr": 1e-3, "clip_grad": 1e9, **sections.get("optimizer", {})},
    }
    for name in _SECTIONS.keys() & values.keys():
        values[name] = _SECTIONS[name](**values[name])
    return Config(**values)


def start_trainer(model_dir: Path, config: Config) -> MegatronTrainer:
    """The model at `model_dir` under `config`'s layout; for the first trainer of a worker."""
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    return another_trainer(model_dir, config)


def another_trainer(model_dir: Path, config: Config) -> MegatronTrainer:
    """A fresh trainer in a process that already has its groups."""
    with ExitStack() as files:
        open_slice = slice_opener(read_index(model_dir), files)
        return MegatronTrainer(read_architecture(model_dir), config, open_slice)


def random_batch(*, responses: int = 5, tokens: int = 19, vocab: int = 67) -> TokenBatch:
    """Responses of unequal length behind prompts of unequal length; the second one is empty.

    The numbers are odd on purpose: 5 responses do not divide into micro-batches of 2 nor over 2
    ranks, 19 tokens do not divide over sequence-parallel ranks, 67 ids not over tensor-parallel
    ones.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (responses, tokens), generator=generator)
    mask = torch.zeros(responses, tokens, dtype=torch.bool)
    for i in range(responses):
        begin, end = 1 + 2 * (i % 4), tokens - 3 * (i % 5)
        ids[i, end:] = 0
        if i != 1:
            mask[i, begin:end] = True
    ids[mask.nonzero()[-1].tolist()[0], mask.nonzero()[-1].tolist()[1]] = vocab - 1
    advantages = torch.randn(responses, 1, generator=generator).expand(responses, tokens).clone()
    return TokenBatch(ids, mask, torch.zeros(responses, tokens), advantages)


def with_stale_logprobs(batch: TokenBatch, logprobs: Tensor, *, leap: float = 3.0) -> TokenBatch:
    """The batch as if some updates had passed since its old log-probs: ratios inside the clip
    range, outside of it, and, every seventh by exp(`leap`), beyond the dual clip.
    """
    generator = torch.Generator().manual_seed(2)
    drift = 0.3 * torch.randn(logprobs.shape, generator=generator)
    drift[:, ::7] -= leap
    return batch.with_old_logprobs((logprobs + drift) * batch.response_mask)


def full_gradients(trainer: LearningModel) -> dict[str, Tensor]:
    """Gradients of the last update by HF name, whole, before clipping: the weight stream run on
    Megatron's gradient buffers. Collective.
    """
    for ddp in trainer.wrapped:
        if ddp.ddp_config.use_distributed_optimizer:
            _gather_gradient_shards(ddp)
    stream = copy.copy(trainer.weights)
    stream.dtype = torch.float32
    stream.held = {
        unit: [replace(held, parameter=_gradient(held.parameter)) for held in parts]
        for unit, parts in trainer.weights.held.items()
    }
    every_unit = trained_units(FULL, trainer.arch)
    return {name: tensor.to("cpu", copy=True) for name, tensor in stream.tensors(every_unit)}


def _gradient(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.main_grad.clone())  # type: ignore[attr-defined]


def _gather_gradient_shards(ddp: Any) -> None:
    """The distributed optimizer leaves each rank the sum of its own shard of a bucket only."""
    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def replica_gap(trainer: LearningModel) -> float:
    """The largest difference, over all ranks, between copies of what should be equal: parameters
    and gradients of uncut parameters over tensor-parallel ranks, and of the tied unembedding
    between the first and the last stage. Collective.
    """
    from megatron.core import parallel_state as mpu

    pairs = []
    for unit, parts in trainer.weights.held.items():
        for held in parts:
            values = torch.cat([held.parameter.detach().float().flatten(), _flat_gradient(held)])
            if held.row.cut is None:
                pairs.append((values, mpu.get_tensor_model_parallel_group()))
            tied_copy = unit == "tied unembedding" or (unit == "embedding" and trainer.arch.tied)
            if tied_copy and mpu.get_pipeline_model_parallel_world_size() > 1:
                pairs.append((values, mpu.get_embedding_group()))
    gap = torch.zeros(1)
    for values, group in pairs:
        high, low = values.clone(), values.clone()
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        gap = torch.maximum(gap, (high - low).max())
    dist.all_reduce(gap, op=dist.ReduceOp.MAX)
    return float(gap)


def _flat_gradient(held: Any) -> Tensor:
    return held.parameter.main_grad.detach().flatten()


def snapshot(trainer: LearningModel) -> dict[str, Tensor]:
    """The whole model by HF name, copied. Collective."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in trainer.all_weights()}


def train_once(trainer: MegatronTrainer, batch: TokenBatch, policy: Policy, lr: float) -> Any:
    """One on-policy update, as the loop makes it."""
    old, _ = trainer.logprobs(batch, policy)
    return trainer.update(batch.with_old_logprobs(old), policy, lr=lr)
