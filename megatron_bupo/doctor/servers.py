"""Do the servers at `servers.addresses` answer, and are they of this model?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from megatron_bupo.config import Config
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, of_error
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.client import Refused, ServerClient, ServerError

AREA = "servers"


def servers(config: Config, timeout_s: float) -> Iterator[Finding]:
    """Each of them."""
    if config.rollout.engine == "sglang" and config.servers.addresses:
        yield from asyncio.run(_all(config, timeout_s))


async def _all(config: Config, timeout_s: float) -> list[Finding]:
    found = await asyncio.gather(
        *(_one(config, address, timeout_s) for address in config.servers.addresses)
    )
    return [finding for findings in found for finding in findings]


async def _one(config: Config, address: str, timeout_s: float) -> list[Finding]:
    client, found = ServerClient(address, config.servers.api_key), []
    try:
        async with asyncio.timeout(timeout_s):
            async for finding in _asked(config, client):
                found.append(finding)  # noqa: PERF401 - what came before a timeout is kept
    except InputError as error:
        found.append(of_error(AREA, error))
    except TimeoutError:
        reason = f"{address} does not answer within {timeout_s:g} s"
        way_out = "see its log; is it still loading, or a firewall between?"
        found.append(Finding(AREA, PROBLEM, reason, way_out))
    except Refused as error:
        way_out = "is it SGLang, and does something stand before it? See its log"
        if error.status in (401, 403):
            way_out = "set servers.api_key to the one that it was started with"
        found.append(Finding(AREA, PROBLEM, f"{address}: {error}", way_out))
    except (ServerError, ValueError, TypeError) as error:
        way_out = "is it SGLang, is it up, and is this its address?"
        found.append(Finding(AREA, PROBLEM, f"{address}: {error}", way_out))
    finally:
        await client.close()
    return found


async def _asked(config: Config, client: ServerClient) -> AsyncIterator[Finding]:
    facts = await client.facts()
    said = f"{client.address}: SGLang {facts.version}, tp {facts.tp_size}, {facts.dtype}"
    yield Finding(AREA, OK, said)
    info = await client._either("/model_info", "/get_model_info")
    served = str(info.get("model_path"))
    if Path(served).name != Path(config.model.path).name:
        reason = f"{client.address} serves {served}, and model.path={config.model.path}"
        way_out = "start it with the model that trains; only weights are brought to it"
        yield Finding(AREA, WARNING, reason, way_out)
    room, longest = facts.context_tokens, config.data.max_prompt_tokens
    longest += config.rollout.max_response_tokens
    if room is not None and longest > room - 2:
        reason = (
            f"{client.address} has a context of {room} tokens, and a response may need {longest}"
        )
        yield Finding(AREA, PROBLEM, reason, f"start it with --context-length {longest + 2}")
    try:
        await client.get("/health")
    except ServerError as error:
        reason = f"{client.address} is up but does not generate ({error})"
        yield Finding(AREA, PROBLEM, reason, "see its log; it may be paused or still loading")
