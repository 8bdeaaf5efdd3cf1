"""One node of a launched run: torchrun, with manners that a scheduler understands.

torchrun dies of a signal that it does not know, kills its ranks half a minute after one that it
does, and exits with 1 whatever they exited with. Here a warning (SIGUSR2) reaches the ranks and
leaves it alone, ranks have `--grace` seconds to end a step and save it (`stopping.py`), and the
exit code is theirs. Ranks are numbered in the order of nodes. When a run was preempted, the file
`run_dir/launch/again` says that whoever launched it should start it again.

    python -m megatron_bupo.launch.node --nodes 2 --processes 8 -- --config RECIPE key=value ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.server_rules import STARTED
from megatron_bupo.errors import BAD_INPUT, TRY_AGAIN, InputError
from megatron_bupo.launch.addresses import first_node, node_rank, wait_for
from megatron_bupo.launch.folder import again_file, launch_dir, log_dir, node_file, start_name
from megatron_bupo.launch.serve import beside
from megatron_bupo.stopping import hold_back


def main(argv: Sequence[str] | None = None) -> int:
    """Be a node; the exit code of its ranks."""
    hold_back()
    words = list(sys.argv[1:] if argv is None else argv)
    bar = words.index("--")
    args, settings = _parser().parse_args(words[:bar]), words[bar + 1 :]
    if args.directory is not None:
        os.chdir(args.directory)
    try:
        return _be_node(load_config(settings[1], settings[2:]), args, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _be_node(config: Config, args: argparse.Namespace, settings: Sequence[str]) -> int:
    """Start what belongs to this node, and wait until its ranks have ended."""
    run_dir = Path(expand(config.run_dir)).absolute()
    share = (args.beside + args.nodes - 1 - node_rank(args.nodes)) // args.nodes
    first_gpu = 0 if config.rollout.colocated else args.processes
    with beside(config, share, first_gpu=first_gpu) as look:
        if count := args.servers + args.beside:
            found = wait_for(run_dir, count, config.servers, look=look)
            settings = [*settings, f"servers.addresses={json.dumps(found)}"]
            os.environ[STARTED] = str(count)
        _note(run_dir, None)
        code = _torchrun(args, run_dir, settings)
        _note(run_dir, code)
    if code == TRY_AGAIN:
        again_file(run_dir).write_text(f"{start_name()}\n")
    return code


def _note(run_dir: Path, code: int | None) -> None:
    """Write down how the first node is."""
    launch_dir(run_dir).mkdir(parents=True, exist_ok=True)
    if node_rank() == 0:
        node_file(run_dir).write_text(json.dumps({"pid": os.getpid(), "code": code}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_bupo.launch.node")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, default=29500, help="of several nodes")
    parser.add_argument("--grace", type=int, default=120, help="seconds")
    parser.add_argument("--servers", type=int, default=0, help="on other nodes, to wait for")
    parser.add_argument("--beside", type=int, default=0, help="servers on these nodes, in all")
    parser.add_argument("--directory", help="to work in")
    return parser


def _free_port() -> int:
    """Of this machine, where several runs may be at work."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _torchrun(args: argparse.Namespace, run_dir: Path, settings: Sequence[str]) -> int:
    """Run the ranks of this node, with a log of each; the exit code that says most."""
    from torch.distributed import DistNetworkError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    rank = node_rank()
    logs = log_dir(run_dir, rank)
    logs.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(args.grace)  # torch < 2.9: 30 s, always
    words = ["--nnodes", str(args.nodes), "--nproc-per-node", str(args.processes)]
    words += ["--node-rank", str(rank), "--master-addr", first_node() or "127.0.0.1"]
    port = args.port if args.nodes > 1 else _free_port()
    words += ["--master-port", str(port), "--max-restarts", "0"]
    words += ["--log-dir", str(logs), "--tee", "3"]
    began = time.monotonic()
    if signal.SIGUSR2 in signal.sigpending():  # a warning before there was a rank to hear it
        return TRY_AGAIN
    try:
        run.main([*words, "-m", "megatron_bupo", "train", *settings])
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        code = next((code for code in (TRY_AGAIN, BAD_INPUT) if code in codes), 1)
    except DistNetworkError as error:
        at = f"port={args.port} of {first_node()}"
        said = InputError(at, str(error).splitlines()[0], "choose another in the cluster's file")
        print(f"error: {said}", file=sys.stderr)
        code = BAD_INPUT
    except SignalException as caught:  # its ranks were told, and have ended
        code = TRY_AGAIN if caught.sigval == signal.SIGTERM else 128 + int(caught.sigval)
    else:
        code = 0
    print(f"node {rank}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
