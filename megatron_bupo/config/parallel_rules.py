"""Can the ranks split this run, and this model, the way `parallel.*` says?"""

from __future__ import annotations

from typing import Protocol

from megatron_bupo.config.expert_rules import ExpertSizes, check_experts
from megatron_bupo.config.layout import Layout, check_layers_divide, layers_of_stages
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError


class ModelSizes(Protocol):
    """The part of `hf.architecture.Architecture` that is checked; config does not import hf."""

    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def experts(self) -> ExpertSizes | None: ...


def check_parallel(config: Config) -> None:
    """The rules about the layout that need no model."""
    _interleaving_needs_a_pipeline(config)
    _two_interleaved_stages_tell_their_neighbours_apart(config)
    _sequence_parallelism_needs_tensor_parallelism(config)
    _only_shards_are_gathered(config)


def check_parallel_against_model(config: Config, model: ModelSizes) -> None:
    """Layers, heads, channels and experts divide among the ranks that share them."""
    check_layers_divide(model.layers, config)
    check_experts(config, model.experts, model.layers)
    _every_stage_has_experts(config, model)
    _tensor_parallelism_divides(config, model)


def _interleaving_needs_a_pipeline(config: Config) -> None:
    if config.parallel.vpp > 1 and config.parallel.pp == 1:
        raise InputError(
            f"parallel.vpp={config.parallel.vpp}",
            "chunks are interleaved over pipeline stages, and parallel.pp=1",
            "set parallel.pp to 2 or more, or parallel.vpp=1",
        )
    if config.parallel.vpp > 1 and config.megatron.get("deallocate_pipeline_outputs"):
        raise InputError(
            "megatron.deallocate_pipeline_outputs=true",
            f"reports a wrong loss where parallel.vpp={config.parallel.vpp} interleaves chunks",
            "remove it, or set parallel.vpp=1",
        )


def _two_interleaved_stages_tell_their_neighbours_apart(config: Config) -> None:
    """Before and after are one peer there, and unless sends overlap they arrive in another order
    than they are asked for: Megatron-Core then computes with the wrong tensors, silently.
    """
    if config.parallel.vpp == 1 or config.parallel.pp != 2:
        return
    for key, works in (("overlap_p2p_comm", True), ("batch_p2p_comm", False)):
        value = config.megatron.get(key, works)
        if value is not works:
            raise InputError(
                f"megatron.{key}={str(value).lower()}",
                "two interleaved stages (parallel.pp=2) would confuse what they send each other",
                f"remove it, or set parallel.vpp=1 or parallel.pp={2 * config.parallel.pp}",
            )


def _sequence_parallelism_needs_tensor_parallelism(config: Config) -> None:
    if config.parallel.sp and config.parallel.tp == 1:
        raise InputError(
            "parallel.sp=true",
            "splits sequences over the tensor-parallel ranks, and parallel.tp=1",
            "set parallel.tp to 2 or more, or parallel.sp=false",
        )


def _only_shards_are_gathered(config: Config) -> None:
    gathers = config.megatron.get("overlap_param_gather")
    if gathers and not config.parallel.distributed_optimizer:
        raise InputError(
            "megatron.overlap_param_gather=true",
            "there is nothing to gather where parallel.distributed_optimizer=false",
            "set parallel.distributed_optimizer=true, or remove it",
        )


def _tensor_parallelism_divides(config: Config, model: ModelSizes) -> None:
    tp = config.parallel.tp
    sizes = {"attention heads": model.heads, "key-value heads": model.kv_heads}
    if model.experts is None or len(model.experts.layers) < model.layers:
        sizes["MLP channels"] = model.ffn_size
    for what, size in sizes.items():
        if size % tp:
            fits = [n for n in range(1, tp) if all(s % n == 0 for s in sizes.values())]
            raise InputError(
                f"parallel.tp={tp}",
                f"does not divide the model's {size} {what}",
                f"choose {' or '.join(map(str, fits))}",
            )


def _every_stage_has_experts(config: Config, model: ModelSizes) -> None:
    parallel = config.parallel
    if model.experts is None or not parallel.distributed_optimizer:
        return
    layout = Layout(parallel.tp, parallel.pp, parallel.vpp, 1, parallel.tp * parallel.pp)
    stages = layers_of_stages(model.layers, layout, config.megatron)
    for stage, chunks in enumerate(stages):
        if not any(layer in chunk for chunk in chunks for layer in model.experts.layers):
            raise InputError(
                f"parallel.pp={parallel.pp}, parallel.distributed_optimizer=true",
                f"no layer of stage {stage} has experts, and then Megatron-Core cannot write the "
                "optimizer's checkpoint",
                "choose fewer stages, or parallel.distributed_optimizer=false",
            )
