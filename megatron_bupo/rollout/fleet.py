"""All servers of a run, kept alive: started or found, watched, restarted, lent to requests.

One rank runs the fleet, on a loop of its own. A server lives through

    starting -> up -> lost -> up -> ... -> given up

(one that somebody else started is looked for even then) and may be used while it is up and carries
the current weights; one that is up and does not has missed an update and waits for it. Requests
lease the server with the fewest tokens outstanding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.rollout.background import within
from megatron_bupo.rollout.client import Refused, ServerClient, ServerError
from megatron_bupo.rollout.draft import version_number
from megatron_bupo.rollout.front import Front
from megatron_bupo.rollout.internal_policies import is_switchable
from megatron_bupo.rollout.processes import ServerProcess
from megatron_bupo.rollout.server import MEMORY, Server, State

if TYPE_CHECKING:
    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config.schema import Config

LOOK_S = 0.5  # between two looks at a process
TELL_S = 10.0  # between two words about a server that is still starting
HEALTH_TIMEOUT_S = 30.0  # /health gives up after 20 by itself
UNHEALTHY_AFTER = 3  # checks in a row
LONGEST_BACKOFF_S = 30.0


class Fleet:
    """The servers that `config.servers` describes. Coroutines and callbacks of one loop."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.settings = config, config.servers
        self.version = 0  # of the weights that the trainer has
        self.read_out: Policy = FULL  # the policy to sample from
        self.is_open = asyncio.Event()  # cleared while weights change under way
        self.is_open.set()
        self.changed = asyncio.Event()  # some server is not what it was
        self.say: Callable[[str], None] | None = None  # who wants to hear what happens
        self._news: list[str] = []  # from before there was somebody
        key = self.settings.api_key
        if self.settings.addresses:
            self.servers = [
                Server(f"server {i} at {address}", ServerClient(address, key))
                for i, address in enumerate(self.settings.addresses)
            ]
        else:
            processes = [ServerProcess(i, config, run_dir) for i in range(self.settings.count)]
            self.servers = [
                Server(f"server {i}", ServerClient(process.address, key), process)
                for i, process in enumerate(processes)
            ]
        self.router = Front(config, run_dir) if self.settings.router else None
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start or find every server, and wait until each is up or has failed.

        Raises:
            InputError: none came up, with what the first had to say.
        """
        self._keepers = [asyncio.create_task(self._keep(server)) for server in self.servers]
        while any(server.state is State.STARTING for server in self.servers):
            await self.change()
        if not any(server.state is State.UP for server in self.servers):
            first = self.servers[0]
            where = "servers.addresses" if self.settings.addresses else "sglang.*, servers.*"
            raise InputError(where, f"{first.name} did not come up: {first.why}")

    async def close(self) -> None:
        """Stop the servers that were started here."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self.router is not None:
            await self.router.close()
        for server in self.servers:
            await server.client.close()
            if server.process is not None:
                await asyncio.to_thread(server.process.stop)

    @property
    def up(self) -> list[Server]:
        """Servers that answer."""
        return [server for server in self.servers if server.state is State.UP]

    @property
    def usable(self) -> list[Server]:
        """Servers that answer with the current weights, from the policy that is asked for."""
        return [s for s in self.up if s.version == self.version and s.read_out == self.read_out]

    @property
    def behind(self) -> list[Server]:
        """Servers that answer with other weights."""
        return [server for server in self.up if server.version != self.version]

    async def on_each(
        self, servers: Sequence[Server], action: Callable[[Server], Awaitable[None]]
    ) -> None:
        """`action` on all `servers` at once; those where it fails are lost."""

        async def tried(server: Server) -> None:
            try:
                await action(server)
            except ServerError as error:
                self.lose(server, str(error))

        await asyncio.gather(*map(tried, servers))

    async def switch_read_outs(self, layers: int) -> None:
        """Have servers with the current weights sample from the policy that is asked for."""
        wrong = [s for s in self.up if s.version == self.version and s.read_out != self.read_out]
        await self.on_each(wrong, lambda s: s.sample_from(self.read_out, layers=layers))

    async def pause(self, mode: str) -> None:
        """Stop sampling on all servers; what is under way stays there, or comes back with what it
        has.
        """
        self.is_open.clear()
        await self.on_each(self.up, lambda s: s.client.post("/pause_generation", {"mode": mode}))

    async def resume(self) -> None:
        """Sample again."""
        await self.on_each(self.up, lambda s: s.resume())
        self.is_open.set()
        self.changed.set()

    async def sleep(self) -> None:
        """Have all servers give their GPU memory to the trainer."""
        await self.on_each(self.up, lambda s: s.sleep())

    async def wake(self, *kinds: str) -> None:
        """Have them take it back."""
        await self.on_each(self.up, lambda s: s.wake(kinds or MEMORY))

    async def change(self, timeout_s: float = LOOK_S) -> None:
        """Wait until some server is not what it was, or a moment has passed."""
        if await within(timeout_s, self.changed):
            self.changed.clear()

    async def lease(self, tokens: int, *, needed: Callable[[], bool]) -> Server | None:
        """The usable server with the fewest tokens outstanding, waited for; `tokens` count as
        outstanding from now on. None: no longer `needed`.

        Raises:
            RunStopped: no server is left, and none will come back.
        """
        while needed():
            if self.is_open.is_set() and (usable := self.usable):
                if self.router is not None:
                    await self.router.choose_among(usable)
                server = min(usable, key=lambda s: (s.suspected.is_set(), s.outstanding_tokens))
                server.outstanding_tokens += tokens
                return server
            if all(server.state is State.GIVEN_UP for server in self.servers):
                reasons = "; ".join(f"{s.name}: {s.why}" for s in self.servers)
                raise RunStopped(f"all servers are gone: {reasons}")
            await self.change()
        return None

    def lose(self, server: Server, why: str, state: State = State.LOST) -> None:
        """`server` cannot be used any more; its keeper sees to the rest."""
        if server.state not in (State.LOST, State.GIVEN_UP) or state is State.GIVEN_UP:
            server.drop(why, state)
            self.tell(f"{server.name} is {state.value}: {why}")
            server.suspected.set()

    def tell(self, news: str) -> None:
        """Something happened that whoever runs this wants to know."""
        self._news.append(news)
        self.changed.set()
        if self.say is not None:
            told, self._news = self._news, []
            for line in told:
                self.say(line)

    async def _keep(self, server: Server) -> None:
        """Look after `server` for as long as there is hope."""
        failures = 0
        while True:
            try:
                await self._bring_up(server)
                failures = 0
                await self._watch(server)
            except InputError as error:  # the same the next time
                self.lose(server, str(error), State.GIVEN_UP)
                return
            except Exception as error:  # whatever it answered: who keeps it must live
                self.lose(server, f"{type(error).__name__}: {error}")
            failures += 1
            server.restarts += server.process is not None
            if self._hopeless(server, failures) and server.state is not State.GIVEN_UP:
                self.lose(server, server.why, State.GIVEN_UP)
                if server.process is not None:
                    return
            await asyncio.sleep(min(2.0 ** (failures - 1) - 1, LONGEST_BACKOFF_S))

    def _hopeless(self, server: Server, failures: int) -> bool:
        if server.process is None:
            return failures > self.settings.attempts
        never_was_up = server.incarnation == 1 and server.facts is None
        return never_was_up or server.restarts > self.settings.restarts

    async def _bring_up(self, server: Server) -> None:
        """Start `server` if it is ours to start, and get to know it."""
        began = time.monotonic()
        if server.process is not None:
            await asyncio.to_thread(server.process.stop)  # what is left of its last life
            await server.client.close()
            await asyncio.to_thread(server.process.start)
            server.client = ServerClient(server.process.address, self.settings.api_key)
            self.tell(f"{server.name} starts at {server.address}, log {server.process.log}")
        server.suspected.clear()
        try:
            if server.process is None:  # an update that broke off may have left it paused
                await server.resume()
            await self._until_ready(server, began)
            server.facts = await server.client.facts()
            if self.config.rollout.colocated:
                server.check_sharing(self._ranks_of_each())
        except Refused as error:
            if error.status in (401, 403):
                where, way_out = "servers.api_key", "set it to the one that the server was given"
                raise InputError(where, f"{server.name} says {error}", way_out) from None
            raise
        if server.process is not None:  # another's may say so of other weights
            server.version = version_number(await server.client.weight_version())
        elif await is_switchable(server.client):  # and may sample from what it was last asked to
            server.read_out = None
        server.state = State.UP
        seconds = time.monotonic() - began
        self.tell(f"{server.name} is up after {seconds:.0f} s: SGLang {server.facts.version}")

    def _ranks_of_each(self) -> int | None:
        """Of a server that the trainer's ranks feed one to one; None: they do not."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return ranks // len(self.servers) if self.config.sync.mode == "ipc" else None

    async def _until_ready(self, server: Server, began: float) -> None:
        deadline, told = began + self.settings.start_timeout_s, began
        while True:
            try:
                await server.client.get("/health", timeout_s=HEALTH_TIMEOUT_S)
                return
            except ServerError as error:
                if server.process is None and not isinstance(error, Refused):
                    raise
            if server.process is not None and (code := server.process.poll()) is not None:
                words = server.process.last_words(4)
                raise ServerError(f"ended with code {code}; {server.process.log} ends: {words}")
            now = time.monotonic()
            if now > deadline:
                limit = self.settings.start_timeout_s
                raise ServerError(f"not ready after servers.start_timeout_s={limit:g}")
            if now > told + TELL_S:
                told = now
                self.tell(f"{server.name} has been starting for {now - began:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def _watch(self, server: Server) -> None:
        """Return when `server` is lost."""
        checked, failures = time.monotonic(), 0
        while server.state is State.UP:
            await within(LOOK_S, server.suspected)
            process = server.process
            if process is not None and (code := process.poll()) is not None:
                self.lose(server, f"its process ended with code {code}")
            if server.state is not State.UP:
                return
            due = time.monotonic() > checked + self.settings.health_every_s
            # A server that is paused is not healthy: /health waits for a token that cannot come.
            # Nor is one that sleeps, and it would die of the token.
            may_look = self.is_open.is_set() and not server.asleep
            if may_look and (due or server.suspected.is_set()):
                healthy = await server.client.healthy(timeout_s=HEALTH_TIMEOUT_S)
                if not self.is_open.is_set() or server.asleep:
                    continue
                checked, failures = time.monotonic(), 0 if healthy else failures + 1
                if healthy:
                    server.suspected.clear()
                elif failures == UNHEALTHY_AFTER:
                    self.lose(server, f"failed {failures} health checks in a row")
                else:
                    server.suspected.set()
                    await asyncio.sleep(LOOK_S)
