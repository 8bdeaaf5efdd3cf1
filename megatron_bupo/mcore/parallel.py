"""This rank's place: process group, Megatron's parallel groups, and the little the rest asks of
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_bupo.config.layout import Layout
from megatron_bupo.config.timeouts import COLLECTIVE_TIMEOUT_S
from megatron_bupo.mcore import cpu

TIMEOUT = timedelta(seconds=COLLECTIVE_TIMEOUT_S)


def join_process_group() -> None:
    """Join the process group (from torchrun's environment, or alone), unless this rank is in it."""
    # Megatron asks for it, so that tensor-parallel traffic overlaps; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def initialize(layout: Layout, *, seed: int) -> None:
    """Join the process group and split it by `layout`.

    Orders ranks tp-fastest, then cp, dp and pp, as Megatron does.
    """
    join_process_group()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def leave() -> None:
    """Leave the groups of this layout; `initialize` may then join those of another. Collective."""
    dist.barrier()  # nobody still waits in one of them
    for group in mpu._global_process_group_list or ():
        if group is not None:  # as which Megatron lists the process group itself
            dist.destroy_process_group(group)
    mpu.destroy_model_parallel()


def shutdown() -> None:
    """Leave the groups; the process group goes last."""
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def joined(layout: Layout, *, seed: int, stay: bool = False) -> Iterator[None]:
    """Be one rank of `layout` inside the block. `stay`: the process group outlives it, for what
    comes next; torchrun's store would answer a second one with the addresses of the first.

    A rank that fails does not leave: those that wait for it would report a lost connection, and
    perhaps sooner than it reports the cause.
    """
    initialize(layout, seed=seed)
    try:
        yield
    except BaseException:
        if layout.world == 1:
            shutdown()
        raise
    if stay:
        leave()
    else:
        shutdown()


def on_any_rank(flag: bool) -> bool:
    """Is `flag` set on any rank at all? Collective."""
    found = torch.tensor(float(flag), device=cpu.device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def pipeline_group() -> dist.ProcessGroup:
    """This rank's peers on the other pipeline stages, itself included."""
    return cast("dist.ProcessGroup", mpu.get_pipeline_model_parallel_group())


def tensor_group() -> dist.ProcessGroup:
    """This rank's peers that hold the other shards of its layers, itself included."""
    return cast("dist.ProcessGroup", mpu.get_tensor_model_parallel_group())


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as the last pipeline stage has it, on every stage; same shape and dtype
    everywhere.
    """
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        source = mpu.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=pipeline_group())
    return tensor


def context_group() -> dist.ProcessGroup:
    """This rank's peers that hold the other tokens of its sequences, itself included."""
    return cast("dist.ProcessGroup", mpu.get_context_parallel_group())


def sum_over_context(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over the ranks that hold the other tokens of its sequences, in place."""
    group = context_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_over_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all ranks that see other tokens (data- and context-parallel), in
    place.
    """
    group = cast("dist.ProcessGroup", mpu.get_data_parallel_group(with_context_parallel=True))
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_over_stages(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over the pipeline stages, in place."""
    group = pipeline_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
