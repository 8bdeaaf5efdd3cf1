"""Which command runs on how many nodes? A recipe's layout on a cluster's nodes, role by role.

Ranks fill nodes one by one, so tensor-parallel groups, which are neighbours, stay inside a node.
Servers have nodes of their own (`server_nodes`), or are spread over the trainer's: on the GPUs that
its ranks leave, or on theirs (`rollout.colocated`). On a single node its first rank starts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.config import Config, expand
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.server_rules import gpus_per_server
from megatron_bupo.errors import InputError
from megatron_bupo.launch.cluster import Cluster

TRAINER, SERVERS = "train", "serve"
THERE = "/nemo_run/code"  # where NeMo-Run puts what is shipped


@dataclass(frozen=True)
class Role:
    """`words` is what `python -m` runs on each of `nodes` nodes."""

    name: str
    nodes: int
    processes: int  # ranks, or servers, on a node
    words: tuple[str, ...]
    beside: int = 0  # servers on the nodes of ranks, in all


@dataclass(frozen=True)
class Launch:
    """What was asked for: a recipe with its overrides, on a cluster."""

    recipe: str
    overrides: tuple[str, ...]
    config: Config
    cluster: Cluster
    directory: Path  # that relative paths start from
    nodes: int | None = None  # of the trainer; None: what the layout needs

    @property
    def run_dir(self) -> Path:
        """Where all of it is written, absolute."""
        return self.directory / expand(self.config.run_dir)

    @property
    def home(self) -> Path:
        """Where `status`, `logs` and `cancel` find it on this machine."""
        if self.cluster.in_place:
            return self.run_dir
        return self.directory / "launched" / self.run_dir.name


def roles(launch: Launch) -> list[Role]:
    """The trainer, and servers where they have nodes of their own.

    Raises:
        InputError: the layout does not fill the nodes, or they have no GPUs for the servers.
    """
    cluster = launch.cluster
    nodes, processes = _trainer_nodes(launch)
    beside = _servers_beside(launch, nodes, processes)
    words = ["megatron_bupo.launch.node", "--nodes", str(nodes), "--processes", str(processes)]
    words += ["--port", str(cluster.port), "--grace", str(cluster.grace_s)]
    found = []
    if beside:
        words += ["--beside", str(beside)]
    if cluster.server_nodes:
        each = _servers_per_node(launch)
        words += ["--servers", str(each * cluster.server_nodes)]
        serving = ["megatron_bupo.launch.serve", "--servers", str(each), *_settings(launch)]
        found.append(Role(SERVERS, cluster.server_nodes, each, tuple(serving)))
    return [Role(TRAINER, nodes, processes, (*words, *_settings(launch)), beside), *found]


def _settings(launch: Launch) -> list[str]:
    """Where a role goes to, and the recipe with its overrides, after a bar."""
    where = ["--directory", str(launch.directory)] if launch.cluster.in_place else []
    if launch.cluster.kind == "kubernetes":  # other scripts of NeMo-Run's go there
        where = ["--directory", THERE]
    return [*where, "--", "--config", launch.recipe, *launch.overrides]


def _trainer_nodes(launch: Launch) -> tuple[int, int]:
    config, per_node = launch.config, launch.cluster.processes
    world = None if launch.nodes is None else launch.nodes * per_node
    world = parallel_sizes(config, world).world
    if world <= per_node and launch.nodes in (None, 1):
        return 1, world
    if world % per_node:
        raise InputError(
            f"parallel.*: {world} ranks",
            f"do not fill nodes of {per_node}",
            f"choose parallel.dp or --nodes so that {per_node} divides the number of ranks",
        )
    return world // per_node, per_node


def _servers_beside(launch: Launch, nodes: int, ranks: int) -> int:
    """How many servers the trainer's nodes, of `ranks` each, start: none where it has one node,
    whose first rank does.
    """
    config, cluster = launch.config, launch.cluster
    elsewhere = config.servers.addresses or cluster.server_nodes or config.debug.replay is not None
    if config.rollout.engine != "sglang" or elsewhere:
        return 0
    taken, each = 0 if config.rollout.colocated else ranks, gpus_per_server(config)
    on_a_node = math.ceil(config.servers.count / nodes)
    if (
        0 < cluster.gpus_per_node < taken + on_a_node * each
        and config.sglang.get("device") != "cpu"
    ):
        reason = f"{on_a_node} a node, of {each} GPUs, where there are {cluster.gpus_per_node}"
        raise InputError(
            f"servers.count={config.servers.count}",
            f"{reason}, beside {ranks} ranks" if taken else reason,
            "lower it or processes_per_node, set rollout.colocated=true, or set server_nodes",
        )
    if nodes == 1:
        return 0
    count, mode = config.servers.count, config.sync.mode
    if mode == "ipc" and (count % nodes or on_a_node * each != ranks):
        raise InputError(
            f"sync.mode=ipc with servers.count={count}, sglang.tp_size={each} on {nodes} nodes",
            f"every rank feeds one rank of a server of its node, and nodes have {ranks}",
            f"choose servers.count x sglang.tp_size = {nodes * ranks}, a server within a node",
        )
    return count


def _servers_per_node(launch: Launch) -> int:
    config, cluster = launch.config, launch.cluster
    where = f"server_nodes={cluster.server_nodes}"
    if config.rollout.engine != "sglang":
        reason = f"rollout.engine={config.rollout.engine} has no servers"
        raise InputError(where, reason, "set rollout.engine=sglang, or server_nodes: 0")
    if config.servers.addresses:
        reason = "servers.addresses names servers that run already"
        raise InputError(where, reason, "remove one of the two")
    if config.rollout.colocated:
        reason = "rollout.colocated=true has servers share the trainer's GPUs"
        raise InputError(where, reason, "remove one of the two")
    if not cluster.gpus_per_node:
        return config.servers.count
    each = gpus_per_server(config)
    if each > cluster.gpus_per_node:
        reason = f"a server of {each} GPUs does not fit a node of {cluster.gpus_per_node}"
        raise InputError(f"sglang.tp_size={config.sglang.get('tp_size', 1)}", reason, "lower it")
    return cluster.gpus_per_node // each


def working_tree() -> Path:
    """The directory that this very package is imported from."""
    return Path(__file__).parents[2]
