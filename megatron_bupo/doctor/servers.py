"""Do the servers at `servers.addresses` answer, and are they of this model?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from megatron_bupo.config import Config
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding, of_error
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.client import ServerClient, ServerError

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
    client = ServerClient(address, config.servers.api_key)
    try:
        async with asyncio.timeout(timeout_s):
            return [finding async for finding in _asked(config, client)]
    except InputError as error:
        return [of_error(AREA, error)]
    except TimeoutError:
        reason = f"{address} does not answer within {timeout_s:g} s"
        return [Finding(AREA, PROBLEM, reason, "see its log; is a firewall between?")]
    except (ServerError, ValueError, TypeError, AttributeError) as error:
        reason = f"{address}: {error}"
        way_out = "is it SGLang, is it up, and is servers.api_key its own?"
        return [Finding(AREA, PROBLEM, reason, way_out)]
    finally:
        await client.close()


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
    if not await client.healthy(timeout_s=20):
        reason = f"{client.address} is up but does not generate"
        yield Finding(AREA, PROBLEM, reason, "see its log; it may be paused or still loading")
