"""One node of SGLang servers, for a trainer on other nodes.

Each server listens at the address by which the trainer's first node reaches this one, and is
announced in the run directory when it is ready (`addresses.py`). One that ends is started again
where it was: the trainer, who keeps looking for it there, then brings it the weights. The servers
end with this process, and Slurm ends that with the trainer.

    python -m megatron_bupo.launch.serve --servers 2 -- --config RECIPE key=value ...
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.errors import InputError
from megatron_bupo.launch.addresses import own_address, publish
from megatron_bupo.launch.node import BAD_INPUT, first_node, hold_back, node_rank
from megatron_bupo.rollout.processes import ServerProcess

LOOK_S = 1.0
HEALTH_TIMEOUT_S = 30.0


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
        return serve(load_config(settings[1], settings[2:]), args.servers)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def serve(config: Config, count: int) -> int:
    """Keep `count` servers going; returns when one has used up `servers.restarts`."""
    run_dir, node = Path(expand(config.run_dir)).absolute(), node_rank()
    host = own_address(first_node())
    # No trainer shares this node's GPUs, and its servers draw other responses than those of others
    sglang = {"base_gpu_id": 0, **config.sglang}
    config = replace(config, sglang=sglang, seed=config.seed + (node << 32))
    servers = [
        ServerProcess(i, config, run_dir, host=host, name=f"{node}-{i}") for i in range(count)
    ]
    restarts, announced = [0] * count, [False] * count
    try:
        for server in servers:
            server.start()
        while True:
            for i, server in enumerate(servers):
                if (code := server.poll()) is not None:
                    print(f"server {node}-{i} ended with code {code}: {server.last_words(4)}")
                    restarts[i] += 1
                    if restarts[i] > config.servers.restarts or not announced[i]:
                        return 1
                    server.start(urlsplit(server.address).port)
                elif not announced[i] and _is_ready(server.address, config.servers.api_key):
                    announced[i] = True
                    publish(run_dir, f"server-{node:05d}-{i:02d}", server.address)
                    print(f"server {node}-{i} is ready at {server.address}", flush=True)
            time.sleep(LOOK_S)
    finally:
        for server in servers:
            server.stop()


def _is_ready(address: str, api_key: str | None) -> bool:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{address}/health", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=HEALTH_TIMEOUT_S):
            return True
    except OSError:  # urllib's own are of this kind
        return False


if __name__ == "__main__":
    sys.exit(main())
