"""Tensors through a process group: NCCL between GPUs, gloo on CPU. The way for large models.

Each pair of sending stage and server has a group of its own, of the stage's sender (rank 0) and the
server's tensor-parallel ranks. A server that dies breaks its own groups and no others.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_bupo.rollout.client import ServerClient
from megatron_bupo.rollout.processes import own_address
from megatron_bupo.rollout.sync.transport import Bucket, Target, Transport

T = TypeVar("T")


class BroadcastTransport(Transport):
    """`/update_weights_from_distributed`; groups are made when first needed and kept."""

    @cached_property
    def _unique(self) -> str:
        """Neither side takes a name again, and a server may have known other trainers."""
        return uuid.uuid4().hex

    @cached_property
    def _groups(self) -> dict[tuple[str, str], dist.ProcessGroup]:
        """Address and name -> group."""
        return {}

    def pass_on(self, bucket: Bucket, targets: Sequence[Target]) -> Mapping[str, str]:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [[*tensor.shape] for _, tensor in bucket],
            "flush_cache": False,
        }
        tensors = [tensor.detach().contiguous() for _, tensor in bucket]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the gathering ran on this thread's stream

        async def share(target: Target, client: ServerClient) -> None:
            life = f"{target.index}-{target.incarnation}"
            name = f"megatron-bupo-{self._unique}-{self.place.stage}-{life}"
            group = await self._group(target, client, name)
            request = client.post(
                "/update_weights_from_distributed",
                {**body, "group_name": name},
                timeout_s=self.settings.timeout_s,
            )
            sending = asyncio.ensure_future(
                asyncio.to_thread(_broadcast, group, tensors, self.settings.timeout_s)
            )
            try:
                await _both(request, sending)
            except BaseException:
                del self._groups[target.address, name]
                sending.add_done_callback(lambda _: dist.destroy_process_group(group))
                raise

        return self.on_all(targets, share)

    def close(self) -> None:
        """Leave the groups too: what forks or ends with one of them open waits for its threads."""
        super().close()
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups.clear()

    async def _group(self, target: Target, client: ServerClient, name: str) -> dist.ProcessGroup:
        key = (target.address, name)
        if key not in self._groups:
            host = own_address(urlsplit(target.address).hostname or "127.0.0.1")
            world = 1 + target.tp_size
            port, store = _store(host, world, self.settings.timeout_s)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            body = {
                "master_address": host,
                "master_port": port,
                "rank_offset": 1,
                "world_size": world,
                "group_name": name,
                "backend": backend,
            }
            request = client.post(
                "/init_weights_update_group", body, timeout_s=self.settings.timeout_s
            )
            joining = asyncio.to_thread(_join, store, name, world, backend, self.settings.timeout_s)
            self._groups[key] = await _both(request, joining)
        return self._groups[key]


async def _both(request: Awaitable[object], ours: Awaitable[T]) -> T:
    """The result of `ours`, once the server has answered too. A refusal counts at once: what we
    wait for will then never come, and ends at its own timeout.
    """
    asked, doing = asyncio.ensure_future(request), asyncio.ensure_future(ours)
    await asyncio.wait({asked, doing}, return_when=asyncio.FIRST_EXCEPTION)
    for task in (asked, doing):  # the second error says nothing new
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
    for task in (asked, doing):
        if task.done():
            task.result()
    return doing.result()


def _store(host: str, world: int, timeout_s: float) -> tuple[int, dist.TCPStore]:
    store = dist.TCPStore(
        host,
        0,
        world,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return store.port, store


def _join(
    store: dist.Store, name: str, world: int, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Be rank 0 of the group. torch has no public way to join one beside the default group; this
    is the private one that SGLang's side and every trainer use.
    """
    private: Any = c10d
    group, _ = private._new_process_group_helper(
        world,
        0,
        [],
        private.Backend(backend),
        private.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=timeout_s),
    )
    private._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def _broadcast(group: dist.ProcessGroup, tensors: Sequence[torch.Tensor], timeout_s: float) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.timeout = timedelta(seconds=timeout_s)
    on_gpu = tensors[0].is_cuda
    # The current device is each thread's own.
    with torch.cuda.device(tensors[0].device) if on_gpu else nullcontext():
        works = [group.broadcast([tensor], options) for tensor in tensors]
        for work in works:
            work.wait()
        if on_gpu:
            torch.cuda.synchronize()
