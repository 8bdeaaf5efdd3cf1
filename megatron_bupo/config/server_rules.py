"""Can the servers be started, or found, with these settings, and the weights be brought to them?

An option stands in `_OURS` because one of our keys says the same thing or because we choose it
anew at each start; in `_UNSUPPORTED` because training with it would go wrong. All others are
SGLang's to know: they pass through, and its own error message is in the server's log.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_bupo.config.load import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

# Is in the environment where servers.addresses names servers started with these very settings
STARTED = "BUPO_SERVERS_STARTED"
_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")
_PROBE = """
import importlib.metadata, importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name) is None:
        sys.exit(f"no {name}")
    try:
        print(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print("unknown")
"""
_PROBE_S = 60.0
# A server is no rank of the trainer's, and makes process groups of its own.
_RANK_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)

_OURS = {
    "model.path": "model_path model",
    "model.tokenizer": "tokenizer_path",
    "seed": "random_seed",
    "servers.api_key": "api_key admin_api_key",
    "rollout.colocated": "enable_memory_saver",
    "sglang.tp_size": "tp tensor_parallel_size",
    "sglang.pp_size": "pp pipeline_parallel_size",
    "sglang.dp_size": "dp data_parallel_size",
}
_UNSUPPORTED = {
    "host port": (
        "we choose where the servers that we start listen",
        "remove it, or start servers yourself and name them in servers.addresses",
    ),
    "nnodes node_rank dist_init_addr nccl_init_addr use_ray": (
        "servers are started on this machine only",
        "start those that span machines yourself and name them in servers.addresses",
    ),
    "weight_version": ("it counts the steps that the weights have learned from", "remove it"),
    "config": ("options in a file would pass by our checks", "write them as sglang.*"),
    "grpc_mode smg_grpc_mode encoder_only disaggregation_mode is_embedding": (
        "such a server does not answer /generate by itself",
        "remove it",
    ),
}
_REASONS: dict[str, tuple[str, str]] = {
    **{
        name: (f"{ours} says the same", f"set {ours} instead")
        for ours, names in _OURS.items()
        for name in names.split()
    },
    **{name: why for names, why in _UNSUPPORTED.items() for name in names.split()},
}


def check_servers(config: Config, world: int, *, here: bool = True) -> None:
    """All rules about servers, for a trainer of `world` ranks; `here`: of this machine too."""
    if config.rollout.engine != "sglang" or config.debug.replay is not None:
        return
    _servers_share_gpus_by_turns(config)
    _addresses_are_addresses(config)
    if not config.servers.addresses:
        _refuse_owned_options(config.sglang)
    _weights_can_travel(config, world)
    if here:
        check_sync_directory(config)
        server_packages(config)


def doubts(config: Config) -> list[str]:
    """What is set and says nothing to this run."""
    servers = config.servers
    if config.rollout.engine != "sglang":
        unused = {"sglang.*": config.sglang, "servers.addresses": servers.addresses}
        why = f"rollout.engine={config.rollout.engine}"
    elif servers.addresses and STARTED not in os.environ:
        unused = {"sglang.*": config.sglang, "servers.env": servers.env}
        why = "servers that run already, at servers.addresses"
    else:
        return []
    return [f"warning: {key} says nothing to {why}" for key, value in unused.items() if value]


def gpus_per_server(config: Config) -> int:
    """How many GPUs a server occupies that we start."""
    tp, pp, dp, step = (
        int(config.sglang.get(name, 1)) for name in ("tp_size", "pp_size", "dp_size", "gpu_id_step")
    )
    replicas = 1 if config.sglang.get("enable_dp_attention") else dp  # it divides tp_size
    return tp * pp * replicas * step


def server_environment(config: Config) -> dict[str, str]:
    """Ours, less what makes us a rank, with `servers.env` over it, whose nulls remove a name."""
    inherited = {k: v for k, v in os.environ.items() if not _RANK_VARIABLES.fullmatch(k)}
    merged = {**inherited, **{str(name): value for name, value in config.servers.env.items()}}
    return {name: _text(value) for name, value in merged.items() if value is not None}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _addresses_are_addresses(config: Config) -> None:
    seen: set[str] = set()
    for i, address in enumerate(config.servers.addresses):
        where, plain = f"servers.addresses[{i}]={address}", address.rstrip("/")
        parts = _ADDRESS.fullmatch(plain)
        if parts is None or not 0 < int(parts[2]) < 2**16:
            raise InputError(
                where, "is not the address of a server", "write it as http://10.0.0.5:30000"
            )
        if plain in seen:
            raise InputError(where, "is named twice", "name each server once")
        seen.add(plain)


def _refuse_owned_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        known = name.lstrip("-").replace("-", "_")
        if known != name:
            raise InputError(
                f"sglang.{name}={value}", "is not how options are written", f"write sglang.{known}"
            )
        if name in _REASONS:
            reason, way_out = _REASONS[name]
            raise InputError(f"sglang.{name}={value}", reason, way_out)
    if options.get("load_format") == "dummy":
        raise InputError(
            "sglang.load_format=dummy",
            "the first responses must come from the weights of model.path",
            "remove it",
        )


def _servers_share_gpus_by_turns(config: Config) -> None:
    rollout = config.rollout
    if not rollout.colocated:
        return
    if not config.servers.addresses and _several_nodes():
        raise InputError(
            "rollout.colocated=true",
            "a trainer of several nodes starts servers beside its first rank only",
            "use `megatron-bupo launch`, or start servers on every node and name them in "
            "servers.addresses, in the order of the ranks whose GPUs they share",
        )
    if config.sglang.get("device", "cuda") != "cuda":
        raise InputError(
            f"rollout.colocated=true with sglang.device={config.sglang['device']}",
            "only the memory of CUDA devices can be given back and taken again",
            "set rollout.colocated=false",
        )
    if config.sync.mode == "broadcast":
        raise InputError(
            "rollout.colocated=true with sync.mode=broadcast",
            "NCCL connects no two processes that share a GPU",
            "set sync.mode=ipc",
        )
    if rollout.max_staleness:
        raise InputError(
            f"rollout.colocated=true, rollout.max_staleness={rollout.max_staleness}",
            "servers without their memory cannot generate while we train",
            "set one of them to its default (false, 0)",
        )


def _several_nodes() -> bool:
    """Has torchrun started us on more than this one?"""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(world) > int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _weights_can_travel(config: Config, world: int) -> None:
    mode, servers = config.sync.mode, config.servers
    if mode != "ipc":
        return
    if servers.addresses:
        if not config.rollout.colocated:
            raise InputError(
                "sync.mode=ipc with servers.addresses",
                "memory is shared between processes of one machine, and nothing says that they are",
                "set rollout.colocated=true if they use the trainer's GPUs, else "
                "sync.mode=broadcast",
            )
        if world % len(servers.addresses):
            raise InputError(
                f"sync.mode=ipc with {len(servers.addresses)} servers.addresses",
                f"every rank of the trainer feeds one rank of a server, and it has {world}",
                "name servers of equal size that have as many ranks together",
            )
        return
    tp = int(config.sglang.get("tp_size", 1))
    if gpus_per_server(config) != tp:
        raise InputError(
            f"sync.mode=ipc with {gpus_per_server(config)} GPUs per server",
            f"the tensor-parallel ranks of a server are fed, sglang.tp_size={tp} of them",
            "leave sglang.pp_size, sglang.dp_size and sglang.gpu_id_step at 1, "
            "or set sync.mode=broadcast",
        )
    if world != servers.count * tp:
        raise InputError(
            f"sync.mode=ipc with servers.count={servers.count}, sglang.tp_size={tp}",
            f"every rank of the trainer feeds one rank of a server, and it has {world}",
            f"choose servers.count x sglang.tp_size = {world}, or set sync.mode=broadcast",
        )


def check_sync_directory(config: Config) -> None:
    """Weights that go through files have a place to go through."""
    directory = config.sync.directory
    if config.sync.mode != "disk" or directory is None:  # in run_dir, which is looked at elsewhere
        return
    path = Path(expand(directory)).absolute()
    standing = next(p for p in (path, *path.parents) if p.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)):
        raise InputError(
            f"sync.directory={directory}",
            f"cannot be made or written to: {standing} stands in the way",
            "name a directory that the trainer can write and all servers can read",
        )


def server_packages(config: Config, *, timeout_s: float = _PROBE_S) -> dict[str, str]:
    """Versions of the packages that we start, in the interpreter that we start them with.

    Raises:
        InputError: it does not run, or lacks one.
    """
    servers = config.servers
    needed = ["sglang"] * (not servers.addresses) + ["sglang_router"] * servers.router
    if config.rollout.engine != "sglang" or not needed:
        return {}
    where = f"servers.python={servers.python}"
    python = expand(servers.python) if servers.python else sys.executable
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, *needed],
            env=server_environment(config),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        missing = re.fullmatch(r"no (\w+)", said)
        if missing is None:
            way_out = "name an interpreter that has SGLang"
            raise InputError(where, f"is no Python that runs ({said})", way_out) from None
        if servers.python is None:
            where = f"rollout.engine={config.rollout.engine}"
        raise InputError(
            where,
            f"{python} has no {missing[1]}",
            'pip install "megatron-bupo[sglang]" there, or name in servers.python an interpreter '
            "that has it",
        ) from None
    return dict(zip(needed, done.stdout.split(), strict=True))
