"""Which actor does a phase need, and how does one take over from another?

While an internal layer l trains, the pipeline stages above l idle. With `bupo.internal_layout` the
actor of that phase is a model of its own: embedding, layers 1..l, final norm and unembedding, laid
out over the same ranks in another way (PP 4 becomes four times the data-parallel ranks, say). As
layers above l neither learn nor are read, it learns just what the whole model would.

When a phase needs another actor, the present one leaves a checkpoint and its groups and is freed;
the next one is built from `model.path`, as at the start of a run, and takes over from the
checkpoint what that has. No rank ever holds two actors, nor more than its own shards, and to
resume is the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import Policy, depth_of
from megatron_bupo.config import expand
from megatron_bupo.config.internal_layout_rules import internal_config
from megatron_bupo.config.layout import Layout, parallel_sizes
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.trainer import MegatronTrainer


@dataclass(frozen=True)
class ActorPlan:
    """What an actor is built from: its layers, its settings, and who holds what."""

    arch: DecoderSizes
    config: Config
    layout: Layout

    def build(self) -> MegatronTrainer:
        """The actor with the weights of `model.path`; its groups must have been joined.
        Collective.
        """
        with ExitStack() as files:
            index = read_index(expand(self.config.model.path))
            return MegatronTrainer(self.arch, self.config, slice_opener(index, files))

    def take_over(self, before: MegatronTrainer, path: Path) -> MegatronTrainer:
        """The actor with the state that the one `before` has left at `path`, in groups of its own.

        That one is of no more use. Collective.
        """
        _release(before)
        parallel.leave()
        parallel.initialize(self.layout, seed=self.config.seed)
        trainer = self.build()
        checkpoint.load(trainer, path)
        return trainer


def _release(trainer: MegatronTrainer) -> None:
    """Give back the memory of all its tensors.

    To drop the last reference does not: parameters, hooks and autograd's nodes own each other in
    circles, and the garbage collector does not see those that lead through C++.
    """
    for storage in storages(trainer):
        storage.resize_(0)
    torch.cuda.empty_cache()


def storages(trainer: MegatronTrainer) -> Iterator[torch.UntypedStorage]:
    """The memory behind parameters, gradients and optimizer state; what views share comes often."""
    tensors: list[Any] = []
    for chunk in trainer.wrapped:
        tensors += chunk.parameters()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            tensors += [buffer.param_data, buffer.grad_data]
    megatron: Any = trainer.optimizer.megatron
    for part in getattr(megatron, "chained_optimizers", [megatron]):
        if part.optimizer is not None:
            for group in part.optimizer.param_groups:
                tensors += [tensor for p in group["params"] for tensor in (p, p.grad)]
            for state in part.optimizer.state.values():
                tensors += state.values()
    yield from (t.untyped_storage() for t in tensors if isinstance(t, Tensor))


def plan_actor(policy: Policy, arch: DecoderSizes, config: Config, world: int) -> ActorPlan:
    """The actor that trains `policy` of the model `arch` on `world` ranks."""
    layers = depth_of(policy, arch.layers)
    if config.bupo.internal_layout is not None and layers < arch.layers:
        arch, config = arch.lowest(layers), internal_config(config)
    return ActorPlan(arch, config, parallel_sizes(config, world))
