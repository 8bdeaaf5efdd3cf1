"""What could be changed in a recipe: settings that save memory, and layouts that there are.

A change is a setting with what belongs to it (`parallel.tp` and `parallel.sp`, the three keys of
recomputation, servers' sizes and their number), as dotted keys, the way a command line has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from megatron_bupo.config.layout import COUNT_EMBEDDING, COUNT_UNEMBEDDING, UNEVEN
from megatron_bupo.config.schema import Config
from megatron_bupo.config.server_rules import gpus_per_server
from megatron_bupo.planner.activations import FULL
from megatron_bupo.planner.counts import all_parameters
from megatron_bupo.planner.hardware import Hardware
from megatron_bupo.planner.plan import Recipe
from megatron_bupo.planner.serving import BYTES

Changes = Mapping[str, Any]  # dotted key -> value

SIZES = (1, 2, 4, 8, 16, 32)
RECOMPUTE: Changes = {
    "megatron.recompute_granularity": FULL,
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
MOST_STAGES = 32
EVEN: Changes = {f"megatron.{key}": None for key in UNEVEN}
ENDS: Changes = {f"megatron.{COUNT_EMBEDDING}": True, f"megatron.{COUNT_UNEMBEDDING}": True}
FRACTION = "sglang.mem_fraction_static"
ROOM = object()  # in the place of a fraction: as much as there is
SERVER_SHARE = 0.7  # of GPUs, that weights may take of larger servers
LEAST_BYTES = 6  # that a parameter takes wherever it is held: bf16 and its gradient
OF_PARALLEL = ("tp", "pp", "cp", "ep")


def changed(config: Config, changes: Changes) -> Config:
    """`config` with other settings."""
    for key, value in changes.items():
        section, name = key.split(".")
        found = getattr(config, section)
        if isinstance(found, dict):
            new: Any = {k: v for k, v in {**found, name: value}.items() if v is not None}
        else:
            new = replace(found, **{name: value})
        config = replace(config, **{section: new})
    return config


def layouts(recipe: Recipe, hardware: Hardware, gpus: int) -> Iterator[Changes]:
    """All that are tried: tensor-parallel sizes by powers of two, stages that divide the layers, or
    these with embedding and unembedding counted as one more each; with the distributed optimizer,
    with and without recomputation.
    """
    node, arch = hardware.node.gpus, recipe.policy
    tensor = [size for size in SIZES if size <= node and arch.kv_heads % size == 0]
    stages = [size for size in range(1, MOST_STAGES + 1) if _ends(arch.layers, size) is not None]
    experts = SIZES if arch.experts else (1,)
    for tp, pp, cp, ep in product(tensor, stages, (1, 2, 4), experts):
        if (cp > 1 and tp * cp > node) or gpus < tp * pp * cp:
            continue
        held = LEAST_BYTES * all_parameters(arch) / (pp * max(tp, ep))
        if held > hardware.memory_bytes:
            continue
        settings: dict[str, Any] = {
            "parallel.tp": tp,
            "parallel.pp": pp,
            "parallel.vpp": 1,
            "parallel.cp": cp,
            "parallel.ep": ep,
            "parallel.etp": 1 if arch.experts else None,
            "parallel.dp": None,
            "parallel.sp": tp > 1,
            "parallel.distributed_optimizer": True,
            **EVEN,
            **(_ends(arch.layers, pp) or {}),
        }
        yield {**settings, "megatron.recompute_granularity": None}
        yield {**settings, **RECOMPUTE}


def _ends(layers: int, stages: int) -> Changes | None:
    """What lets `stages` share `layers` evenly; None: nothing does."""
    if layers % stages == 0:
        return {}
    return ENDS if (layers + 2) % stages == 0 and layers >= 2 * stages else None


def large_enough_servers(recipe: Recipe, hardware: Hardware) -> Changes:
    """Servers whose weights leave a GPU room, where the recipe's take more than all."""
    config, arch = recipe.config, recipe.policy
    weights = BYTES * all_parameters(arch) / hardware.memory_bytes
    if config.rollout.engine != "sglang" or weights < gpus_per_server(config):
        return {}
    sizes = (found for found in _server_sizes(config, hardware) if arch.heads % _tp(found) == 0)
    return next((found for found in sizes if weights <= SERVER_SHARE * _tp(found)), {})


def _tp(changes: Changes) -> int:
    return changes["sglang.tp_size"]


def _server_sizes(config: Config, hardware: Hardware) -> Iterator[Changes]:
    """Other servers on as many GPUs."""
    now = config.sglang.get("tp_size", 1)
    if config.servers.addresses or not isinstance(now, int):
        return
    for size in SIZES:
        count, rest = divmod(config.servers.count * now, size)
        if size != now and size <= hardware.node.gpus and count and not rest:
            yield {"sglang.tp_size": size, "servers.count": count}


def single_changes(recipe: Recipe, hardware: Hardware) -> Iterator[Changes]:
    """Changes that save memory, each of one setting or of what belongs to it."""
    config = recipe.config
    parallel = config.parallel
    if config.megatron.get("recompute_granularity") != FULL:
        yield RECOMPUTE
    if not parallel.distributed_optimizer:
        yield {"parallel.distributed_optimizer": True}
    if parallel.tp > 1 and not parallel.sp:
        yield {"parallel.sp": True}
    if config.rollout.engine == "sglang":
        yield {FRACTION: ROOM}
        yield from _server_sizes(config, hardware)
    budget = config.trainer.max_tokens_per_microbatch
    if budget > recipe.work.longest:
        yield {"trainer.max_tokens_per_microbatch": recipe.work.longest}
    if config.trainer.logprob_chunk_tokens > 256:
        yield {"trainer.logprob_chunk_tokens": 256}
    for name in OF_PARALLEL if recipe.policy.experts else OF_PARALLEL[:-1]:
        for size in SIZES:
            if size > getattr(parallel, name) and (name != "tp" or size <= hardware.node.gpus):
                # sequence parallelism comes with tensor parallelism
                more = {"parallel.sp": True} if name == "tp" else {}
                ends = _ends(recipe.policy.layers, size) if name == "pp" else {}
                yield {f"parallel.{name}": size, **more, **(ends or {})}


def together(group: tuple[Changes, ...]) -> Changes | None:
    """All changes of a group, if no two speak of one setting."""
    keys = [key for changes in group for key in changes]
    if len(set(keys)) < len(keys):
        return None
    return {key: value for changes in group for key, value in changes.items()}


def as_settings(changes: Changes) -> str:
    """As they are written on a command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def what_differs(config: Config, changes: Changes) -> Changes:
    """Those of `changes` that `config` does not have already."""
    return {key: value for key, value in changes.items() if _value(config, key) != value}


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    found = getattr(config, section)
    return found.get(name) if isinstance(found, dict) else getattr(found, name)


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
