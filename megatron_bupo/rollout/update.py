"""One update of the servers' weights: opened on all of them, sent by all ranks, confirmed by each.

What the ranks do in between is `sync/`; this is the first rank's part before and after. A server
that fails anywhere is lost to the fleet: half an update is no weights at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.rollout.sync.disk import version_dir
from megatron_bupo.rollout.sync.transport import Sent, Target

if TYPE_CHECKING:
    from megatron_bupo.rollout.fleet import Fleet
    from megatron_bupo.rollout.server import Server

PADDED = ("embed_tokens.weight", "lm_head.weight")  # to a round vocabulary


@dataclass(frozen=True)
class Plan:
    """Who gets what."""

    version: int
    changed: tuple[Target, ...]  # have the version before, and need what changed since
    whole: tuple[Target, ...]  # have none or another, and need all
    paused: bool  # responses were under way
    digest: bool  # checksums of what is sent are wanted

    def names(self, server: Server) -> bool:
        """Does the plan name `server`, in this life of it?"""
        keys = {(t.address, t.incarnation) for t in (*self.changed, *self.whole)}
        return (server.address, server.incarnation) in keys


async def open_update(fleet: Fleet, version: int) -> Plan:
    """Prepare all servers that are up for the weights of `version`."""
    sync = fleet.config.sync
    paused = any(server.outstanding_tokens for server in fleet.up)
    fleet.is_open.clear()
    usable, behind = fleet.usable, [s for s in fleet.up if s not in fleet.usable]
    await fleet.wake("weights")
    await _prepare(fleet, [*usable, *behind], pause=sync.pause if paused else None)
    return Plan(
        version=version,
        changed=_targets(fleet, usable),
        whole=_targets(fleet, behind),
        paused=paused,
        digest=sync.verify or bool(behind),
    )


async def open_catch_up(fleet: Fleet) -> Plan:
    """Prepare the servers that are behind for the weights that all others have; these go on."""
    behind = fleet.behind
    await _prepare(fleet, behind, pause=None)
    return Plan(fleet.version, (), _targets(fleet, behind), paused=False, digest=True)


async def close_update(fleet: Fleet, plan: Plan, sent: Sequence[Sent], folder: Path) -> int:
    """Confirm the update wherever it arrived; how many servers have it."""
    errors = {address: error for part in sent for address, error in part.errors.items()}
    servers = [server for server in fleet.up if plan.names(server)]
    for server in servers:
        if server.address in errors:
            fleet.lose(server, f"weights of version {plan.version}: {errors[server.address]}")
    sync = fleet.config.sync
    keeps_cache = plan.paused and sync.pause == "in_place"

    async def finish(server: Server) -> None:
        if sync.mode == "disk":
            body = {
                "model_path": str(version_dir(folder, plan.version).absolute()),
                "load_format": "safetensors",
                "flush_cache": False,
            }
            await server.client.post("/update_weights_from_disk", body, timeout_s=sync.timeout_s)
        in_session = sync.mode != "disk"
        await server.end_update(plan.version, keeps_cache=keeps_cache, in_session=in_session)

    await fleet.on_each([s for s in servers if s.address not in errors], finish)
    if sync.mode == "disk":
        shutil.rmtree(version_dir(folder, plan.version), ignore_errors=True)
    fleet.version = plan.version
    if plan.digest:
        await _verify(fleet, plan, sent)
    await fleet.wake()
    if plan.paused:
        await fleet.on_each([s for s in fleet.up if plan.names(s)], lambda s: s.resume())
    fleet.is_open.set()
    fleet.changed.set()
    return len(fleet.usable)


def _targets(fleet: Fleet, servers: Sequence[Server]) -> tuple[Target, ...]:
    """Those of `servers` that are still up."""
    return tuple(
        Target(
            address=server.address,
            incarnation=server.incarnation,
            index=fleet.servers.index(server),
            tp_size=server.facts.tp_size if server.facts else 1,
        )
        for server in servers
        if server in fleet.up
    )


async def _prepare(fleet: Fleet, servers: Sequence[Server], *, pause: str | None) -> None:
    in_session = fleet.config.sync.mode != "disk"

    async def begin(server: Server) -> None:
        spans = server.facts is not None and server.facts.tells_spans
        # A release that cannot say which weights drew which token must return what it has.
        mode = pause if pause is None or spans else "abort"
        await server.begin_update(pause=mode, in_session=in_session)

    await fleet.on_each(servers, begin)


async def _verify(fleet: Fleet, plan: Plan, sent: Sequence[Sent]) -> None:
    """Servers whose weights are not what was sent, or not what the others have, are lost.

    The trainer's own checksums speak of tensors that SGLang does not fuse, split, pad or cast, on
    CPU; on GPU, where it hashes otherwise, servers can only be compared with each other.
    """
    digests = {
        name: digest
        for part in sent
        for name, digest in part.digests.items()
        if not name.endswith(PADDED)
    }
    found: dict[Server, dict[str, str]] = {}

    async def ask(server: Server) -> None:
        found[server] = await server.checksums()

    await fleet.on_each(fleet.usable, ask)
    recovered = {(t.address, t.incarnation) for t in plan.whole}
    trusted = sorted(found, key=lambda s: (s.address, s.incarnation) in recovered)
    for server, sums in found.items():
        expected = dict(found[trusted[0]])
        facts = server.facts
        if facts and facts.device == "cpu" and facts.dtype == fleet.config.model.dtype:
            expected |= {name: d for name, d in digests.items() if name in sums}
        wrong = [name for name, digest in sums.items() if expected.get(name, digest) != digest]
        if wrong and facts == trusted[0].facts:
            fleet.lose(server, f"{wrong[0]} is not what was sent (checksum {sums[wrong[0]]})")
