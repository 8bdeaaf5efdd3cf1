"""The model as a stream of `(hf_name, full tensor)`: all that trainer and rollout engines share.

Unit by unit (embedding, each layer, ...) the stage that holds a unit gathers it over its
tensor-parallel ranks and broadcasts it along the pipeline, in one flat buffer. No rank ever holds
more than one unit beside its own shards. Only units that the step's policy trains travel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bupo.algorithm.bupo import InternalLayerPolicy, Policy
from megatron_bupo.config.optimizer_rules import layers_of
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.depth import skips_final_norm
from megatron_bupo.mcore.hf_weights import (
    Unit,
    gather_unit,
    held_units,
    hf_shapes,
    layer_unit,
    units,
)


def trained_units(
    policy: Policy, arch: DecoderSizes, lr_factors: Mapping[str, float] | None = None
) -> dict[Unit, float]:
    """The units that a step of `policy` changes (appendix A.4), in model order, each with its
    factor on the learning rate; `lr_factors` are those of `optimizer.lr_factors`, 0: frozen.
    """
    factors: dict[Unit, float] = {}
    for key, factor in (lr_factors or {}).items():
        layers = layers_of(key)
        factors |= dict.fromkeys(map(layer_unit, layers) if layers else [key], factor)
    skipped = {unit for unit, factor in factors.items() if factor == 0}
    if isinstance(policy, InternalLayerPolicy):
        skipped |= {layer_unit(n) for n in range(policy.layer + 1, arch.layers + 1)}
    if skips_final_norm(policy):
        skipped.add("final_norm")
    return {unit: factors.get(unit, 1.0) for unit in units(arch) if unit not in skipped}


class WeightStream:
    """The chunks of this rank as a source of full HF tensors."""

    def __init__(self, chunks: Sequence[Any], arch: Architecture, dtype: torch.dtype) -> None:
        self.arch, self.dtype = arch, dtype
        self.held = held_units(chunks, arch)
        self.shapes = expected_tensors(arch)
        self.owner = self._owners()

    @property
    def unit_of(self) -> dict[nn.Parameter, Unit]:
        """The unit that each parameter of this rank trains with."""
        return {
            held.parameter: "embedding" if unit == "tied unembedding" else unit
            for unit, parts in self.held.items()
            for held in parts
        }

    def _owners(self) -> dict[Unit, int]:
        """The pipeline stage (global rank of this rank's peer there) that holds each unit."""
        group = parallel.pipeline_group()
        held: list[list[Unit]] = [[] for _ in range(group.size())]
        dist.all_gather_object(held, list(self.held), group=group)
        return {
            unit: dist.get_global_rank(group, stage)
            for stage, names in enumerate(held)
            for unit in names
        }

    def tensors(self, wanted: Collection[Unit]) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of the `wanted` units, the same on every rank. Collective."""
        for unit in wanted:
            yield from self._unit(unit)

    def _unit(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        group, owner = parallel.pipeline_group(), self.owner[unit]
        mine = dict(gather_unit(self.held[unit], self.arch)) if unit in self.held else None
        if group.size() == 1:
            assert mine is not None
            yield from mine.items()
            return
        shapes = hf_shapes(unit, self.arch, self.shapes)
        sizes = [prod(shape) for shape in shapes.values()]
        if owner == dist.get_rank() and mine is not None:
            flat = torch.cat([mine[name].flatten() for name in shapes])
        else:
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=cpu.device())
        dist.broadcast(flat, owner, group=group)
        for (name, shape), piece in zip(shapes.items(), flat.split(sizes), strict=True):
            yield name, piece.view(shape)
