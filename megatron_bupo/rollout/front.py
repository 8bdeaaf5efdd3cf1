"""The router as the fleet uses it: it chooses among the servers that may be used, whichever these
are at the moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.errors import RunStopped
from megatron_bupo.rollout.client import ServerClient, Unreachable
from megatron_bupo.rollout.router import Router

if TYPE_CHECKING:
    from megatron_bupo.config.schema import Config
    from megatron_bupo.rollout.server import Server


class Front:
    """A router that is started with the first servers, on one event loop."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.client = ServerClient("", config.servers.api_key)
        self._key = config.servers.api_key
        self._router = Router(config, run_dir)
        self._chosen: list[str] = []
        self._choosing = asyncio.Lock()

    async def choose_among(self, servers: Sequence[Server]) -> None:
        """Send requests to `servers` only.

        Raises:
            RunStopped: the router does not do so.
        """
        wanted = [server.address for server in servers]
        async with self._choosing:
            if wanted == self._chosen:
                return
            try:
                if self.client.address:
                    await asyncio.to_thread(self._router.set_workers, wanted)
                else:
                    await asyncio.to_thread(self._router.start, wanted)
                    self.client = ServerClient(self._router.address, self._key)
            except Unreachable as error:
                if self._router.poll() is not None or not self.client.address:
                    raise RunStopped(str(error)) from None
                return  # a server that died a moment ago: the fleet will say so, and ask again
            self._chosen = wanted

    async def close(self) -> None:
        """Stop the router."""
        await self.client.close()
        await asyncio.to_thread(self._router.stop)
