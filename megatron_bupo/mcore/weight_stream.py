"""The model as a stream of `(hf_name, full tensor)`: all that trainer and rollout engines share.

Unit by unit (embedding, each layer, ...) the stage that holds a unit gathers it over the ranks that
share it and broadcasts it along the pipeline, in one flat buffer; experts follow in parcels of
bounded size. No rank ever holds more than one unit's parcel beside its own shards. Only units that
the step's policy trains travel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megatron_bupo import progress
from megatron_bupo.algorithm.bupo import InternalLayerPolicy, Policy
from megatron_bupo.config.optimizer_rules import layers_of
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.depth import skips_final_norm
from megatron_bupo.mcore.hf_weights import (
    VOCABULARY,
    Pieces,
    Row,
    Unit,
    held_units,
    layer_unit,
    shard_group,
    unit_rows,
    units,
)

PARCEL_BYTES = 2**29  # of whole experts, gathered at a time


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

    def __init__(
        self,
        chunks: Sequence[Any],
        arch: Architecture,
        dtype: torch.dtype,
        *,
        parcel_bytes: int = PARCEL_BYTES,
    ) -> None:
        self.arch, self.dtype, self.parcel_bytes = arch, dtype, parcel_bytes
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
            mine = {held.row.hf: held.parameter for held in self.held.get(unit, ())}
            for parcel in parcels(unit, self.arch, self._experts_at_a_time()):
                progress.beat()
                yield from self._send(parcel, mine, self.owner[unit])

    def of_stage(self, wanted: Collection[Unit]) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of those `wanted` units that this rank's stage holds. Collective
        in the stage.
        """
        for unit in wanted:
            if self.owner[unit] != dist.get_rank():
                continue
            mine = {held.row.hf: held.parameter for held in self.held[unit]}
            for parcel in parcels(unit, self.arch, self._experts_at_a_time()):
                progress.beat()
                yield from gather(parcel, mine, self.arch)

    def _experts_at_a_time(self) -> int:
        """Of each expert-parallel rank, so that together they are a parcel."""
        if self.arch.experts is None:
            return 1
        numbers = 3 * self.arch.hidden_size * self.arch.experts.ffn_size
        bytes_ = numbers * self.dtype.itemsize * mpu.get_expert_model_parallel_world_size()
        return max(1, self.parcel_bytes // bytes_)

    def _send(
        self, parcel: Sequence[Row], mine: Mapping[tuple[str, ...], nn.Parameter], owner: int
    ) -> Iterator[tuple[str, Tensor]]:
        group = parallel.pipeline_group()
        whole = dict(gather(parcel, mine, self.arch)) if mine else {}
        if group.size() == 1:
            yield from whole.items()
            return
        names = [name for row in parcel for name in row.hf]
        sizes = [prod(self.shapes[name]) for name in names]
        if owner == dist.get_rank():
            flat = torch.cat([whole[name].flatten() for name in names])
        else:
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=cpu.device())
        dist.broadcast(flat, owner, group=group)
        for name, piece in zip(names, flat.split(sizes), strict=True):
            yield name, piece.view(self.shapes[name])


class Stream(Protocol):
    """Where an actor's full tensors come from: our table's `WeightStream`, or a bridge's."""

    def tensors(self, wanted: Collection[Unit]) -> Iterator[tuple[str, Tensor]]: ...


class ActorWeights:
    """The `wanted` units of a stream as `Weights`: gone through when somebody needs them."""

    def __init__(
        self, stream: Stream, wanted: Collection[Unit], gather_parameters: Callable[[], None]
    ) -> None:
        self.stream, self.wanted, self.gather_parameters = stream, wanted, gather_parameters
        self.stages, self.stage = 1, 0
        if isinstance(stream, WeightStream):  # a bridge gathers over all stages at once
            group = parallel.pipeline_group()
            self.stages, self.stage = group.size(), group.rank()
        self.sends = dist.get_rank() % (dist.get_world_size() // self.stages) == 0  # pp outermost

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)`, the same on every rank. Collective."""
        self.gather_parameters()
        return self.stream.tensors(self.wanted)

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of what this rank's stage holds. Collective in the stage."""
        if not isinstance(self.stream, WeightStream):
            return iter(self)
        self.gather_parameters()
        return self.stream.of_stage(self.wanted)


def parcels(unit: Unit, arch: Architecture, experts_at_a_time: int) -> Iterator[list[Row]]:
    """The rows of `unit` that are gathered at a time: all but the experts', then some experts of
    each expert-parallel rank, rank by rank.
    """
    common: list[Row] = []
    of: dict[int, list[Row]] = {}
    for row in unit_rows(unit, arch):
        (common if row.expert is None else of.setdefault(row.expert, [])).append(row)
    yield common
    own = len(of) // mpu.get_expert_model_parallel_world_size()
    for first in range(0, own, experts_at_a_time):
        last = min(first + experts_at_a_time, own)
        ranks = range(0, len(of), own)
        yield [row for rank in ranks for e in range(rank + first, rank + last) for row in of[e]]


def gather(
    parcel: Sequence[Row], mine: Mapping[tuple[str, ...], nn.Parameter], arch: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """`(hf_name, full tensor)` of the rows of `parcel`, on every rank of the stage that holds
    them, from `mine`: HF names -> this rank's parameter.

    One all-gather of one flat buffer, over the ranks that cut these rows or share these experts.
    """
    own = [mine[row.hf] for row in parcel if row.hf in mine]
    group = shard_group(parcel[0])
    if len(own) < len(parcel):  # its ranks are ordered by expert, then by shard
        group = cast("dist.ProcessGroup", mpu.get_expert_tensor_and_model_parallel_group())
    flat = torch.cat([parameter.detach().flatten() for parameter in own])
    shards = [flat]
    if group.size() > 1:
        shards = [torch.empty_like(flat) for _ in range(group.size())]
        dist.all_gather(shards, flat, group=group)
    pieces = [shard.split([parameter.numel() for parameter in own]) for shard in shards]
    cuts = len(shards) * len(own) // len(parcel)
    for i, row in enumerate(parcel):
        holder, place = divmod(i, len(own))
        theirs = pieces[holder * cuts : (holder + 1) * cuts]
        shaped = [piece[place].view(own[place].shape) for piece in theirs]
        yield from zip(row.hf, _whole(shaped, row, arch), strict=True)


def _whole(shards: Sequence[Tensor], row: Row, arch: Architecture) -> Pieces:
    """The full HF tensors from the parameter's shards on all ranks that cut it."""
    if row.cut is None:
        return row.split(shards[0], arch)
    per_rank = [row.split(shard, arch) for shard in shards]
    whole = tuple(torch.cat(pieces, dim=row.cut) for pieces in zip(*per_rank, strict=True))
    return tuple(t[: arch.vocab_size] for t in whole) if row in VOCABULARY else whole
