"""Which node is this, and how does the trainer find servers that were started for it? Each writes
its address into the run directory when it is ready, and every node of the trainer waits until as
many answer as there are to be.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from megatron_bupo.config.schema import ServersConfig
from megatron_bupo.durable import replace_text
from megatron_bupo.errors import InputError
from megatron_bupo.launch.folder import address_dir

# Of this node among them and of the first, by Slurm, SkyPilot, Kubeflow, Lepton in this order
NODE_RANK = ("SLURM_NODEID", "SKYPILOT_NODE_RANK", "PET_NODE_RANK", "NODE_RANK")
FIRST_NODE = ("BUPO_FIRST_NODE", "SKYPILOT_NODE_IPS", "PET_MASTER_ADDR", "MASTER_ADDR")

LOOK_S = 1.0
HEALTH_TIMEOUT_S = 30.0


def node_rank(nodes: int = 1) -> int:
    """Which of the `nodes` is this?

    Raises:
        InputError: there are several, and nobody says.
    """
    found = next((int(os.environ[name]) for name in NODE_RANK if os.environ.get(name)), None)
    if found is None and nodes > 1:
        reason = f"is not set, nor is what a scheduler sets, on one of {nodes} nodes"
        raise InputError("NODE_RANK", reason, "set it to 0 on the first of them, then to 1, ...")
    return found or 0


def first_node() -> str | None:
    """The address of the first of the nodes; None: nobody says."""
    found = next((os.environ[name] for name in FIRST_NODE if os.environ.get(name)), None)
    return found and found.split()[0]


def publish(run_dir: Path, name: str, address: str) -> None:
    """The server `name` is ready at `address`."""
    folder = address_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / name, f"{address}\n")


def is_ready(address: str, api_key: str | None) -> bool:
    """Does the server there answer?"""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{address}/health", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=HEALTH_TIMEOUT_S):
            return True
    except (OSError, ValueError):  # urllib's own are of the first kind
        return False


def wait_for(
    run_dir: Path, count: int, settings: ServersConfig, *, look: Callable[[], None]
) -> list[str]:
    """The addresses of `count` servers that answer, in the order of their names. An address may be
    one of an earlier start, whose server is no more. `look` is called now and then, and may raise.

    Raises:
        InputError: there are fewer after `servers.start_timeout_s`.
    """
    folder, deadline = address_dir(run_dir), time.monotonic() + settings.start_timeout_s
    while True:
        found = _read(folder)
        ready = [address for address in found if is_ready(address, settings.api_key)]
        if len(found) == len(ready) == count:
            return found
        look()
        if time.monotonic() > deadline:
            raise InputError(
                f"servers.start_timeout_s={settings.start_timeout_s:g}",
                f"{len(ready)} of {count} servers are ready ({folder})",
                f"see {run_dir / 'servers'}/*.log, or wait longer",
            )
        time.sleep(LOOK_S)


def _read(folder: Path) -> list[str]:
    files = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    return [path.read_text().strip() for path in files]
