"""Which rank holds which part of the model? Sizes of the groups, and the layers of every stage.

Ranks are ordered as Megatron orders them: tensor-parallel fastest, then context-parallel, then
data-parallel, then pipeline. Experts have groups of their own over the ranks of a stage. With `vpp`
chunks per stage the layers are dealt out round by round: stage 0, 1, ... of chunk 0, then of chunk
1. Example, 8 layers on pp=2, vpp=2: stage 0 holds layers 1-2 and 5-6, stage 1 holds 3-4 and 7-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bupo.config.expert_rules import check_expert_ranks
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

FIRST_STAGE_LAYERS = "num_layers_in_first_pipeline_stage"
LAST_STAGE_LAYERS = "num_layers_in_last_pipeline_stage"
COUNT_EMBEDDING = "account_for_embedding_in_pipeline_split"
COUNT_UNEMBEDDING = "account_for_loss_in_pipeline_split"
UNEVEN = (FIRST_STAGE_LAYERS, LAST_STAGE_LAYERS, COUNT_EMBEDDING, COUNT_UNEMBEDDING)


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; `world` = tp x cp x pp x dp ranks."""

    tp: int
    pp: int
    vpp: int
    dp: int
    world: int
    cp: int = 1
    ep: int = 1
    etp: int | None = None  # tensor-parallel size inside an expert; None: tp

    def stage_ranks(self, stage: int) -> range:
        """The ranks of pipeline stage `stage`, counted from 0."""
        per_stage = self.world // self.pp
        return range(stage * per_stage, (stage + 1) * per_stage)

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share every layer's matrices."""
        return self._groups(self.tp, 1)

    def context_groups(self) -> list[list[int]]:
        """Ranks that share every sequence's tokens."""
        return self._groups(self.cp, self.tp)

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights and see different responses."""
        return self._groups(self.dp, self.tp * self.cp)

    def expert_groups(self) -> list[list[int]]:
        """Ranks that share the experts of every layer."""
        return self._groups(self.ep, self.etp or self.tp)

    def _groups(self, size: int, stride: int) -> list[list[int]]:
        """Groups of `size` ranks, `stride` apart, in the ranks of every stage."""
        block = size * stride
        return [
            list(range(first + shift, first + shift + block, stride))
            for first in range(0, self.world, block)
            for shift in range(stride)
        ]


def parallel_sizes(config: Config, world_size: int | None) -> Layout:
    """The layout over `world_size` ranks; None: as many ranks as `parallel.*` asks for."""
    parallel = config.parallel
    model_ranks = parallel.tp * parallel.cp * parallel.pp
    sizes = f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp}"
    sizes += f", parallel.cp={parallel.cp}" if parallel.cp > 1 else ""
    if world_size is None:
        world_size = model_ranks * (parallel.dp or 1)
    if world_size % model_ranks:
        raise InputError(
            sizes,
            f"{model_ranks} ranks hold the model once, which does not divide {world_size} ranks",
            f"start a multiple of {model_ranks} ranks",
        )
    dp = world_size // model_ranks
    if parallel.dp is not None and parallel.dp != dp:
        raise InputError(
            f"parallel.dp={parallel.dp}",
            f"{world_size} ranks with {sizes} leave parallel.dp={dp}",
            f"start {model_ranks * parallel.dp} ranks, or leave parallel.dp out",
        )
    check_expert_ranks(config, world_size)
    return Layout(
        parallel.tp,
        parallel.pp,
        parallel.vpp,
        dp,
        world_size,
        cp=parallel.cp,
        ep=parallel.ep,
        etp=parallel.etp,
    )


def layers_of_stages(layers: int, layout: Layout, megatron: Mapping[str, Any]) -> list[list[range]]:
    """`[stage][chunk]` -> layers, counted from 1. They must divide: `check_layers_divide`."""
    sizes = chunk_sizes(layers, layout.pp, layout.vpp, megatron)
    held: list[list[range]] = [[] for _ in sizes]
    first = 1
    for chunk in range(layout.vpp):
        for stage, chunks in enumerate(sizes):
            held[stage].append(range(first, first + chunks[chunk]))
            first += chunks[chunk]
    return held


def chunk_sizes(layers: int, pp: int, vpp: int, megatron: Mapping[str, Any]) -> list[list[int]]:
    """`[stage][chunk]` -> layers there.

    Megatron's keys for an uneven first or last stage are respected, and those that count the
    embedding or the unembedding as one layer more.
    """
    embedding, unembedding = (
        bool(megatron.get(key)) for key in (COUNT_EMBEDDING, COUNT_UNEMBEDDING)
    )
    stages = _stage_sizes(layers + embedding + unembedding, pp, megatron)
    sizes = [[size // vpp] * vpp for size in stages]
    sizes[0][0] -= embedding
    sizes[-1][-1] -= unembedding
    return sizes


def _stage_sizes(layers: int, pp: int, megatron: Mapping[str, Any]) -> list[int]:
    """Layers per stage, with what counts as one."""
    first, last = megatron.get(FIRST_STAGE_LAYERS), megatron.get(LAST_STAGE_LAYERS)
    even = pp - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    middle = [rest // even] * even if even > 0 else []
    return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]


def check_layers_divide(layers: int, config: Config) -> None:
    """Every chunk of every stage gets a whole number of layers, at least one."""
    pp, vpp, megatron = config.parallel.pp, config.parallel.vpp, config.megatron
    uneven = _uneven_keys(config)
    sizes = chunk_sizes(layers, pp, vpp, megatron)
    if sum(map(sum, sizes)) == layers and all(size >= 1 for chunks in sizes for size in chunks):
        return
    shown = f"parallel.pp={pp}" + (f", parallel.vpp={vpp}" if vpp > 1 else "")
    shown += "".join(f", megatron.{key}={value}" for key, value in uneven.items())
    counted = layers + sum(value is True for value in uneven.values())
    fewest = 1 if vpp == 1 and counted == layers else 2
    possible = [n for n in range(fewest, layers + 1) if counted % (n * vpp) == 0]
    way_out = f"choose parallel.pp from {', '.join(map(str, possible)) or 'none with this vpp'}"
    way_out += f", or set megatron.{FIRST_STAGE_LAYERS} and megatron.{LAST_STAGE_LAYERS}"
    way_out += " instead" if counted > layers else ""
    raise InputError(shown, f"does not divide the model's {layers} layers", way_out)


def _uneven_keys(config: Config) -> dict[str, Any]:
    """Megatron's keys by which stages get unequal numbers of layers, where they fit together."""
    pp, vpp, megatron = config.parallel.pp, config.parallel.vpp, config.megatron
    sized = {
        key: megatron[key]
        for key in (FIRST_STAGE_LAYERS, LAST_STAGE_LAYERS)
        if megatron.get(key) is not None
    }
    counting = {k: megatron[k] for k in (COUNT_EMBEDDING, COUNT_UNEMBEDDING) if megatron.get(k)}
    for key, value in sized.items():
        if type(value) is not int or value < 1:
            raise InputError(f"megatron.{key}={value}", "is not a positive number of layers")
    for key, value in counting.items():
        if value is not True:
            raise InputError(f"megatron.{key}={value}", "is not true or false")
    if (sized or counting) and pp <= 1:
        key = next(iter(sized | counting))
        raise InputError(f"megatron.{key}", "needs parallel.pp > 1", "remove it")
    if sized and counting:
        raise InputError(
            f"megatron.{next(iter(sized))}, megatron.{next(iter(counting))}",
            "are two ways to deal out layers",
            "leave one of them out",
        )
    if len(sized) == pp == 2 and vpp > 1:  # Megatron-Core divides by the stages in between
        raise InputError(
            f"megatron.{FIRST_STAGE_LAYERS}, megatron.{LAST_STAGE_LAYERS}",
            f"cannot both be given with parallel.pp=2 and parallel.vpp={vpp}",
            "leave one of the two out",
        )
    return sized | counting
