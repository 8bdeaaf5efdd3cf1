"""Which part of somebody's model is the GPTModel, and can its internal layers be read out?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_bupo.algorithm.bupo import InternalLayerPolicy, PhaseSchedule, Policy
from megatron_bupo.errors import InputError
from megatron_bupo.mcore.depth import is_above, is_routed, skips_final_norm

ALWAYS = 0  # the height of what every policy trains: the embedding and the unembedding
FINAL_NORM = -1  # trained by the full policy, and where a policy reads out with it

# Of TransformerConfig, with the values that do no harm: what runs layers by another way than by
# calling them one after the other, or reads the model out by another head than the unembedding.
NEEDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "mtp_num_layers": ((None, 0), "multi-token prediction heads read the last layer"),
    "enable_cuda_graph": ((False,), "a captured graph runs all its layers"),
    "external_cuda_graph": ((False,), "a captured graph runs all its layers"),
    "fp8": ((None, False), "scaling factors of layers that do not run are not kept"),
    "fp4": ((None, False), "scaling factors of layers that do not run are not kept"),
    "cpu_offloading": ((False,), "it counts the layers that run"),
    "fine_grained_activation_offloading": ((False,), "it counts the layers that run"),
    "overlap_moe_expert_parallel_comm": ((False,), "its schedule takes layers to pieces"),
    "delay_wgrad_compute": ((False,), "its schedule takes layers to pieces"),
    "fused_residual_rmsnorm": ((False,), "a layer's last sum is left to the next one"),
}
# Wrappers that cut parameters up or wait for the gradient of every one.
WAITS_FOR_ALL = ("FullyShardedDataParallel", "TorchFullyShardedDataParallel")


def gpt_model(module: nn.Module) -> tuple[GPTModel, list[nn.Module]]:
    """The GPTModel inside `module`, and the wrappers around it, from the outside in."""
    wrappers = []
    while not isinstance(module, GPTModel):
        check_wrapper(module)
        inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            reason = "is no Megatron-Core GPTModel, nor a wrapper around one"
            raise InputError(type(module).__name__, reason, "attach to the language model alone")
        wrappers.append(module)
        module = inner
    return module, wrappers


def check_wrapper(module: nn.Module) -> None:
    """Refuse what cannot leave parameters without a gradient."""
    name = type(module).__name__
    unused = getattr(module, "find_unused_parameters", None)  # torch's DistributedDataParallel
    if name in WAITS_FOR_ALL or unused is False:
        reason = "waits for the gradient of every parameter, also of layers that do not run"
        raise InputError(name, reason, "use Megatron-Core's DistributedDataParallel")


def check_whole(chunk: GPTModel) -> None:
    """Refuse parameters that torch's FSDP has cut up, which leaves no wrapper to be seen."""
    if any(isinstance(p, DTensor) for p in chunk.parameters()):
        reason = "gathers layers as they run, and waits for the gradients of all"
        raise InputError("fully_shard", reason, "use Megatron-Core's DistributedDataParallel")


def check_chunk(chunk: GPTModel, schedule: PhaseSchedule) -> None:
    """Refuse a model whose internal layers cannot be read out, by the name of what forbids it."""
    check_schedule(schedule, int(chunk.config.num_layers))
    config: Any = chunk.config
    if is_routed(chunk):
        reason = "has a controller already, or is an actor of megatron_bupo's own"
        raise InputError(type(chunk).__name__, reason, "attach once; detach() undoes it")
    for name, (harmless, reason) in NEEDS.items():
        value = getattr(config, name, harmless[0])
        if value not in harmless:
            way_out = f"set {name}={harmless[0]} for a model that trains internal policies"
            raise InputError(f"{name}={value}", reason, way_out)
    head = getattr(chunk, "output_layer", None) if chunk.post_process else None
    if head is not None and not isinstance(head, ColumnParallelLinear):
        reason = "reads the hidden state out, which is no unembedding"
        raise InputError(
            f"output_layer={type(head).__name__}", reason, "attach to the policy, not to a critic"
        )


def check_graphs(chunk: GPTModel) -> None:
    """Refuse captured graphs, which loops may switch on for sampling and off to train."""
    config: Any = chunk.config
    captured = getattr(config, "cuda_graph_impl", "none")
    if captured not in {None, "none"}:
        reason = "a captured graph runs all its layers, and an internal policy does not"
        raise InputError(f"cuda_graph_impl={captured}", reason, "set it to none while training")


def check_schedule(schedule: PhaseSchedule, layers: int) -> None:
    """Refuse stages that no `layers`-deep model has."""
    for policy, _ in schedule.stages:
        if not isinstance(policy, InternalLayerPolicy):
            reason = "trains no policy, which a loop with a model to train has no use for"
            raise InputError(f"schedule stage {policy}", reason, "leave resting_steps out")
        if not 1 <= policy.layer < layers:
            raise InputError(
                f"schedule stage {policy}",
                f"the model has {layers} layers, and the last one's policy is the full policy",
                f"choose a layer of 1..{layers - 1}",
            )


def trains(policy: Policy, height: int) -> bool:
    """Does `policy` train parameters of that height?"""
    if height == FINAL_NORM:
        return not skips_final_norm(policy)
    return not is_above(policy, height)


def heights(chunk: GPTModel) -> Iterator[tuple[nn.Parameter, int]]:
    """Each parameter of `chunk` with its height, the layer that a policy must reach to train it:
    `ALWAYS` for the ends, `FINAL_NORM` for what is read out with where a policy says so.
    """
    decoder: Any = chunk.decoder
    found = dict.fromkeys(chunk.parameters(), ALWAYS)
    for layer in decoder.layers:
        found |= dict.fromkeys(layer.parameters(), int(layer.layer_number))
    if decoder.final_layernorm is not None:
        found |= dict.fromkeys(decoder.final_layernorm.parameters(), FINAL_NORM)
    yield from found.items()


def unembedding(chunk: GPTModel) -> set[nn.Parameter]:
    """The parameters of its own that `chunk` reads logits out with."""
    head = getattr(chunk, "output_layer", None) if chunk.post_process else None
    return set(head.parameters()) if head is not None else set()
