"""Tensors as memory of the same machine: CUDA IPC handles of a shared GPU, or shared memory on CPU.

The request carries handles, not bytes. Trainer rank r feeds tensor-parallel rank r % tp_size of
server r // tp_size, which has the same GPU; so every rank goes through the whole stream.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing  # noqa: F401 - teaches ForkingPickler tensors
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy

from megatron_bupo.rollout.client import ServerClient
from megatron_bupo.rollout.sync.transport import Bucket, Target, Transport


class IpcTransport(Transport):
    """`/update_weights_from_tensor` with handles to memory that stays until it is answered."""

    everywhere = True

    def pass_on(self, bucket: Bucket, targets: Sequence[Target]) -> Mapping[str, str]:
        held = [(name, tensor.detach().contiguous().clone()) for name, tensor in bucket]
        handles = _gathered(_handles(held))
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = [t for t in targets if t.index * t.tp_size == rank]

        async def post(target: Target, client: ServerClient) -> None:
            begin = target.index * target.tp_size
            await client.post(
                "/update_weights_from_tensor",
                {
                    "serialized_named_tensors": handles[begin : begin + target.tp_size],
                    "flush_cache": False,
                },
                timeout_s=self.settings.timeout_s,
            )

        errors = self.on_all(mine, post) if mine else {}
        if dist.is_initialized():
            dist.barrier()  # nobody frees what another's server still reads
        return errors


def _handles(bucket: Bucket) -> str:
    """Where the tensors are, for another process of this machine."""
    before = get_sharing_strategy()
    set_sharing_strategy("file_system")  # on CPU: SGLang dies of passed file descriptors
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(bucket)
    finally:
        set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()


def _gathered(mine: str) -> list[str]:
    if not dist.is_initialized():
        return [mine]
    handles: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(handles, mine)
    return handles
