"""How are servers made to sample from internal policies?

They are started with a model package of ours (`server_side/`), and then told which layer to read
by two scalars among the weights. A server without the package takes the scalars for weights that it
does not know, and dies or goes on with the full policy; so servers are asked what they sample from,
before a switch and after it.

The key-value cache must be dropped with a switch: layers that did not run left nothing in it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_bupo.algorithm.bupo import InternalLayerPolicy, depth_of
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.client import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config import Config
    from megatron_bupo.rollout.client import ServerClient

SERVER_SIDE = Path(__file__).parent / "server_side"


def server_env() -> dict[str, str]:
    """Environment of a server that can; its PYTHONPATH goes in front of what else is there."""
    return {
        "PYTHONPATH": str(SERVER_SIDE),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "bupo_sglang_models",
    }


def server_options() -> dict[str, Any]:
    """Native options of a server that can: captured CUDA graphs would replay all layers."""
    return {"disable_cuda_graph": True}


def serving_internal_policies(config: Config) -> Config:
    """`config` with servers that can, if we are the ones to start them."""
    if config.servers.addresses:
        return config
    env = server_env()
    theirs = config.servers.env.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    if theirs:
        env["PYTHONPATH"] += f"{os.pathsep}{theirs}"
    servers = replace(config.servers, env={**config.servers.env, **env})
    return replace(config, servers=servers, sglang={**config.sglang, **server_options()})


def switch_tensors(policy: Policy, layers: int) -> list[tuple[str, Tensor]]:
    """What to send among the weights of a model with `layers` layers to sample from `policy`."""
    through_norm = not isinstance(policy, InternalLayerPolicy) or policy.read_out_norm
    return [
        ("internal_policy.layer", torch.tensor(float(depth_of(policy, layers)))),
        ("internal_policy.norm", torch.tensor(float(through_norm))),
    ]


async def is_switchable(client: ServerClient) -> bool:
    """Does a server run our models, and so perhaps what somebody else switched it to?"""
    return await _in_force(client, "internal_policy.layer") is not None


async def samples_from(client: ServerClient, policy: Policy, layers: int) -> bool:
    """Does a server sample from `policy`? An InputError if it never can."""
    for name, tensor in switch_tensors(policy, layers):
        in_force = await _in_force(client, name)
        if in_force is None and isinstance(policy, InternalLayerPolicy):
            names = " ".join(f"{key}={value}" for key, value in server_env().items())
            raise InputError(
                f"the server at {client.address}",
                "cannot sample from internal policies",
                f"start it with {names} and --disable-cuda-graph",
            )
        if in_force not in (None, tensor.item()):
            return False
    return True


async def _in_force(client: ServerClient, name: str) -> float | None:
    """What a server makes of a scalar; None: it runs SGLang's own model, the full policy's."""
    try:
        [value] = await client.post("/get_weights_by_name", {"name": name})
    except Refused:
        return None
    return value
