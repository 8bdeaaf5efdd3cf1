"""How does the trainer find servers on other nodes? Each writes its address into the run directory
when it is ready, and the trainer waits for as many as there are to be.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from megatron_bupo.durable import replace_text
from megatron_bupo.errors import InputError
from megatron_bupo.launch.folder import address_dir

LOOK_S = 1.0


def publish(run_dir: Path, name: str, address: str) -> None:
    """The server `name` is ready at `address`."""
    folder = address_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / name, f"{address}\n")


def wait_for(run_dir: Path, count: int, *, timeout_s: float) -> list[str]:
    """The addresses of `count` servers, in the order of their names.

    Raises:
        InputError: there are fewer after `timeout_s` seconds.
    """
    folder, deadline = address_dir(run_dir), time.monotonic() + timeout_s
    while len(found := _read(folder)) < count:
        if time.monotonic() > deadline:
            raise InputError(
                f"servers.start_timeout_s={timeout_s:g}",
                f"{len(found)} of {count} servers are ready ({folder})",
                f"see {run_dir / 'servers'}/*.log, or wait longer",
            )
        time.sleep(LOOK_S)
    return found


def own_address(towards: str | None) -> str:
    """The address of this node by which the node `towards` reaches it; None: its name's."""
    if towards is None:
        return socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return probe.getsockname()[0]


def _read(folder: Path) -> list[str]:
    files = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    return [path.read_text().strip() for path in files]
