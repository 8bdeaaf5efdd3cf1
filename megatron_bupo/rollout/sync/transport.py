"""How do full tensors get from the ranks that hold them into servers? A bucket at a time.

Each pipeline stage gathers its own units and one of its ranks sends them, so no rank ever holds the
model. A server that fails is left out of what follows; what to do about it is the fleet's business.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from megatron_bupo import progress
from megatron_bupo.rollout.background import BackgroundLoop
from megatron_bupo.rollout.client import ServerClient, ServerError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.config.schema import SyncConfig
    from megatron_bupo.types import Weights

Bucket = list[tuple[str, "Tensor"]]


@dataclass(frozen=True)
class Target:
    """A server that is to get weights. Another `incarnation` knows nothing of the one before."""

    address: str
    incarnation: int
    index: int  # its place among all servers
    tp_size: int = 1


class Place(NamedTuple):
    """Which bucket of an update it is."""

    version: int
    stage: int
    number: int


@dataclass
class Sent:
    """What this rank sent."""

    bytes: int = 0
    errors: dict[str, str] = field(default_factory=dict)  # address -> what went wrong
    digests: dict[str, str] = field(default_factory=dict)  # name -> checksum, where asked for


class Transport(ABC):
    """One way to send. All ranks call `send` with equal targets; one loop does the requests."""

    everywhere: ClassVar[bool] = False  # does every rank pass every tensor on?
    place: Place

    def __init__(
        self,
        settings: SyncConfig,
        *,
        shapes: Mapping[str, Sequence[int]],
        api_key: str | None,
        directory: Path,
    ) -> None:
        """`shapes` are those of the served checkpoint: a server dies of a tensor of another, and
        passes over a name that it does not know.
        """
        self.settings, self.shapes = settings, shapes
        self.api_key, self.directory = api_key, directory
        self._loop: BackgroundLoop | None = None
        self._clients: dict[str, ServerClient] = {}

    def send(
        self, weights: Weights, targets: Sequence[Target], *, version: int, digest: bool
    ) -> Sent:
        """Send `weights` to `targets`, as far as it is this rank's to do. Collective."""
        sent = Sent()
        alive = {target.address: target for target in targets}
        tensors = map(self._checked, weights if self.everywhere else weights.of_stage())
        for number, bucket in enumerate(buckets(tensors, self.settings.bucket_bytes)):
            progress.beat()
            if not (self.everywhere or weights.sends):
                continue  # its part was the gathering
            sent.bytes += sum(tensor.nbytes for _, tensor in bucket)
            if digest:
                sent.digests |= {name: checksum(tensor) for name, tensor in bucket}
            self.place = Place(version, weights.stage, number)
            for address, error in self.pass_on(bucket, list(alive.values())).items():
                sent.errors[address] = error
                alive.pop(address, None)
        return sent

    def _checked(self, named: tuple[str, Tensor]) -> tuple[str, Tensor]:
        name, tensor = named
        if name not in self.shapes:
            raise KeyError(f"{name} is no weight of the served model")
        if tuple(self.shapes[name]) != tuple(tensor.shape):
            held = [*self.shapes[name]]
            raise ValueError(f"{name} is {[*tensor.shape]}, the served model's {held}")
        return named

    @abstractmethod
    def pass_on(self, bucket: Bucket, targets: Sequence[Target]) -> Mapping[str, str]:
        """Bring `bucket` (which `self.place` names) to `targets`; address -> error of those that it
        did not reach.
        """

    def close(self) -> None:
        """End what the transport has open."""
        if self._loop is not None:
            for client in self._clients.values():
                self._loop.run(client.close())
            self._loop.close()

    def on_all(
        self, targets: Sequence[Target], action: Callable[[Target, ServerClient], Awaitable[object]]
    ) -> dict[str, str]:
        """`action` on every target at once; address -> error where it failed."""
        if self._loop is None:
            self._loop = BackgroundLoop("weight sync")
        return self._loop.run(self._on_all(targets, action))

    async def _on_all(
        self, targets: Sequence[Target], action: Callable[[Target, ServerClient], Awaitable[object]]
    ) -> dict[str, str]:
        async def tried(target: Target) -> str | None:
            try:
                await action(target, self.client(target.address))
            except (ServerError, RuntimeError) as error:  # torch's process groups raise the latter
                return str(error)
            return None

        outcomes = await asyncio.gather(*map(tried, targets))
        return {t.address: e for t, e in zip(targets, outcomes, strict=True) if e is not None}

    def client(self, address: str) -> ServerClient:
        """Connections of this transport's own loop."""
        return self._clients.setdefault(address, ServerClient(address, self.api_key))


def buckets(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[Bucket]:
    """`tensors` in order, in lists of at most `most_bytes` (a larger tensor is alone in its)."""
    bucket: Bucket = []
    held = 0
    for name, tensor in tensors:
        if bucket and held + tensor.nbytes > most_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    if bucket:
        yield bucket


def checksum(tensor: Tensor) -> str:
    """What SGLang's weight checker says of an equal tensor on CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
