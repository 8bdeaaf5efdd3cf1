"""One server as the fleet sees it: where it is, whether it lives, which weights it carries."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.client import Refused, ServerClient, ServerError, Unreachable
from megatron_bupo.rollout.draft import NO_VERSION, version_number
from megatron_bupo.rollout.internal_policies import samples_from, switch_tensors
from megatron_bupo.rollout.sync.http import pickled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.rollout.client import ServerFacts
    from megatron_bupo.rollout.processes import ServerProcess

MEMORY = ("weights", "kv_cache")  # kinds that a server can give back, in the order of taking


class State(Enum):
    """What is known of a server. Whether one that is up may be used its weights decide."""

    STARTING = "starting"
    UP = "up"
    LOST = "lost"  # and looked for
    GIVEN_UP = "given up"


@dataclass(eq=False)
class Server:
    """A server, in all its lives: `incarnation` counts them."""

    name: str
    client: ServerClient
    process: ServerProcess | None = None  # None: somebody else started it
    facts: ServerFacts | None = None
    state: State = State.STARTING
    version: int = NO_VERSION  # policy version of its weights, as last confirmed
    read_out: Policy | None = FULL  # the policy that it samples from; None: not known
    incarnation: int = 0
    restarts: int = 0
    asleep: set[str] = field(default_factory=set)  # kinds of memory that it has given back
    outstanding_tokens: int = 0  # asked for and not answered yet
    why: str = ""  # it was lost
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.client.address

    def check_sharing(self, ranks: int | None) -> None:
        """It can share GPUs with the trainer, of which `ranks` feed it (None: it is fed otherwise).

        Raises:
            InputError: it cannot; whoever started it can have it so.
        """
        assert self.facts is not None
        if not self.facts.gives_memory:
            raise InputError(
                "rollout.colocated=true",
                f"{self.name} would not give its GPU memory back",
                "start it with --enable-memory-saver --enable-weights-cpu-backup",
            )
        if ranks not in (None, self.facts.tp_size):
            raise InputError(
                "sync.mode=ipc",
                f"{self.name} has {self.facts.tp_size} ranks, and {ranks} of the trainer's for it",
                "start servers that have together as many ranks as the trainer",
            )

    async def generate(
        self, body: dict[str, Any], *, timeout_s: float, router: ServerClient | None = None
    ) -> Any:
        """The answer to a `/generate` request; Unreachable as soon as the server is lost. A
        `router` may have another server answer.
        """
        client = router or self.client
        task = asyncio.create_task(client.post("/generate", body, timeout_s=timeout_s))
        self.under_way.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Unreachable(f"{self.name} was lost: {self.why}") from None
        finally:
            self.under_way.discard(task)

    def drop(self, why: str, state: State = State.LOST) -> None:
        """It is gone, and what it was asked for must be asked of another."""
        self.state, self.why = state, why
        self.version, self.read_out = NO_VERSION, FULL
        self.asleep.clear()
        self.incarnation += 1
        for task in self.under_way:
            task.cancel()

    async def begin_update(self, *, pause: str | None, in_session: bool) -> None:
        """Stop sampling (`pause` is how) and open a session for weights."""
        if pause is not None:
            await self.client.post("/pause_generation", {"mode": pause})
        if in_session and self.facts is not None and self.facts.has_sessions:
            body = {"selector": "target"}
            try:
                await self.client.post("/begin_weight_update", body)
            except Refused:  # an update that broke off has left its session open
                await self.client.post("/end_weight_update", {})
                await self.client.post("/begin_weight_update", body)

    async def end_update(self, version: int, *, keeps_cache: bool, in_session: bool) -> None:
        """Close the session, forget what old weights computed, and carry `version` from now on.

        Raises:
            ServerError: it did not confirm, and must not be used.
        """
        if in_session:
            await self._end_session()
        if not keeps_cache:
            await self._flush_cache()
        body = {"new_version": str(version), "abort_all_requests": False}
        await self.client.post("/update_weight_version", body)
        confirmed = await self.client.weight_version()
        if version_number(confirmed) != version:
            raise ServerError(f"carries weights {confirmed!r} after an update to {version}")
        self.version = version

    async def _end_session(self) -> None:
        """Close what `begin_update` opened, in a release that has sessions."""
        if self.facts is not None and self.facts.has_sessions:
            await self.client.post("/end_weight_update", {})

    async def _flush_cache(self) -> None:
        """Drop the prefix cache. Requests that were aborted a moment ago may still hold it."""
        for wait_s in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
            try:
                await self.client.post("/flush_cache", {})
                return
            except Refused:
                await asyncio.sleep(wait_s)
        await self.client.post("/flush_cache", {})

    async def sleep(self) -> None:
        """Give GPU memory to whoever shares it; nothing may be under way."""
        if not self.asleep:
            await self.client.post("/release_memory_occupation", {"tags": [*MEMORY]})
            self.asleep.update(MEMORY)

    async def wake(self, kinds: Sequence[str]) -> None:
        """Take memory of these `kinds` back."""
        if missing := [kind for kind in kinds if kind in self.asleep]:
            await self.client.post("/resume_memory_occupation", {"tags": missing})
            self.asleep.difference_update(missing)

    async def sample_from(self, policy: Policy, *, layers: int) -> None:
        """Sample from `policy` of a model with `layers` layers, when nothing is under way."""
        if not await samples_from(self.client, policy, layers):
            text = pickled(switch_tensors(policy, layers)).decode()
            assert self.facts is not None
            body = {"serialized_named_tensors": [text] * self.facts.tp_size, "flush_cache": False}
            await self.begin_update(pause=None, in_session=True)
            await self.client.post("/update_weights_from_tensor", body)
            await self._end_session()
            await self._flush_cache()
            if not await samples_from(self.client, policy, layers):
                where = f"the server at {self.address}"
                raise InputError(where, f"does not sample from the policy {policy}", "see its log")
        self.read_out = policy

    async def resume(self) -> None:
        """Sample again after a pause."""
        await self.client.post("/continue_generation", {})

    async def abort(self, rids: Sequence[str]) -> None:
        """Return the requests `rids` with what they have; no error if that cannot be said."""
        for rid in rids:
            try:
                await self.client.post("/abort_request", {"rid": rid})
            except ServerError:
                return

    async def checksums(self) -> dict[str, str]:
        """Tensor (under SGLang's name) or whole rank -> checksum."""
        reply = await self.client.post("/weights_checker", {"action": "checksum"}, timeout_s=600)
        found: dict[str, str] = {}
        for i, rank in enumerate(reply["ranks"]):
            found[f"rank {i}"] = rank["per_gpu_checksum"]
            if len(reply["ranks"]) == 1:
                found |= rank["checksums"]
        return found
