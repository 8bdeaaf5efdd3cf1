"""SGLang servers of one node, for a trainer on other nodes or on all of them.

Each server listens at the address by which the trainer's first node reaches this one, and is
announced in the run directory when it is ready (`addresses.py`). One that ends is started again
where it was: the trainer, who keeps looking for it there, then brings it the weights.

On a node of their own they are a role, and Slurm ends them with the trainer:

    python -m megatron_bupo.launch.serve --servers 2 -- --config RECIPE key=value ...

Where the trainer has several nodes and servers have none, each node serves beside its ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.errors import BAD_INPUT, InputError
from megatron_bupo.launch.addresses import first_node, is_ready, node_rank, publish
from megatron_bupo.rollout.processes import ServerProcess, own_address
from megatron_bupo.stopping import hold_back

LOOK_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end; the exit code."""
    hold_back()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    words = list(sys.argv[1:] if argv is None else argv)
    bar = words.index("--")
    parser = argparse.ArgumentParser(prog="megatron_bupo.launch.serve")
    parser.add_argument("--servers", type=int, required=True)
    parser.add_argument("--directory", help="to work in")
    args, settings = parser.parse_args(words[:bar]), words[bar + 1 :]
    if args.directory is not None:
        os.chdir(args.directory)
    try:
        config = load_config(settings[1], settings[2:])
        serve(config, args.servers, first_gpu=0, over=threading.Event())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 1


@contextmanager
def beside(config: Config, count: int, *, first_gpu: int) -> Iterator[Callable[[], None]]:
    """Serve `count` servers inside the block; what it gives raises what ended them."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(serve, config, count, first_gpu=first_gpu, over=over) if count else None

        def look() -> None:
            if work is not None and work.done():
                work.result()

        try:
            yield look
        finally:
            over.set()


def serve(config: Config, count: int, *, first_gpu: int, over: threading.Event) -> None:
    """Keep `count` servers going on the GPUs from `first_gpu` on, until it is `over` or each has
    used up `servers.restarts`.

    Raises:
        InputError: one did not come up.
    """
    run_dir, node = Path(expand(config.run_dir)).absolute(), node_rank()
    host = own_address(first_node() or socket.gethostname())
    # Servers of every node draw other responses
    sglang = {"base_gpu_id": first_gpu, **config.sglang}
    config = replace(config, sglang=sglang, seed=config.seed + (node << 32))
    servers = [
        _Served(f"{node:05d}-{i:02d}", ServerProcess(i, config, run_dir, host=host, name=name))
        for i, name in enumerate(f"{node}-{i}" for i in range(count))
    ]
    try:
        for server in servers:
            server.process.start()
        going = servers
        while going and not over.wait(LOOK_S):
            going = [server for server in going if server.goes_on(config, run_dir)]
    finally:
        for server in servers:
            server.process.stop()


@dataclass
class _Served:
    """One of them."""

    name: str
    process: ServerProcess
    restarts: int = 0
    announced: bool = False

    def goes_on(self, config: Config, run_dir: Path) -> bool:
        """Announce it when it is ready, start it again when it has ended; False: once too often."""
        process, settings = self.process, config.servers
        if (code := process.poll()) is not None:
            why = f"server {self.name} ended with code {code}"
            if not self.announced:
                reason = f"{why} before it was ready: {process.last_words(4)}"
                raise InputError("sglang.*, servers.*", reason, f"see {process.log}")
            print(f"{why}: {process.last_words(4)}", flush=True)
            self.restarts += 1
            if self.restarts > settings.restarts:
                return False
            process.start(urlsplit(process.address).port)
        elif not self.announced and is_ready(process.address, settings.api_key):
            self.announced = True
            publish(run_dir, f"server-{self.name}", process.address)
            print(f"server {self.name} is ready at {process.address}", flush=True)
        return True


if __name__ == "__main__":
    sys.exit(main())
