"""What does it take to bring new weights to a SGLang server, by each way of sending them?

    python tools/bench_weight_sync.py --python .venv-sglang/bin/python --json sync.json
    python tools/bench_weight_sync.py --python .venv-sglang/bin/python parallel.pp=2

A random Qwen3 of 1 GB is sent whole, as in the full-policy phase, and up to layer l, as in the
internal phase, through the engine that a run uses; all ways take turns at one server, so that
whatever else the machine does meets all of them alike, and medians are compared. The internal phase
may move (l + 1) / (L + 1) of the bytes plus the embeddings, and the tool fails if it moves more.

A sync is taken apart into gathering full tensors from the trainer's ranks, sending them (for `disk`
writing the files), and the rest: opening the update, its confirmation, and what servers then do by
themselves (for `disk` reading the files). CPU seconds tell who works meanwhile, trainer or server.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is in modules of their own

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.config import Config, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.weight_stream import ActorWeights, trained_units
from megatron_bupo.preflight import Preflight, check_model
from megatron_bupo.rollout.sglang import TRANSPORTS, Model, SGLangEngine
from tools import options
from tools.phase_cost import over_ranks, together_ms
from tools.servers import RunningServer, running_server, server_settings
from tools.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.types import Weights

GIGABYTE = Shape(layers=32, hidden=768, ffn=2304, heads=12, kv_heads=6, vocab=32768)
PARTS = {  # heading: key
    "gather s": "gather_s",
    "send s": "send_s",
    "rest s": "rest_s",
    "trainer CPU s": "trainer_cpu_s",
    "server CPU s": "server_cpu_s",
}
SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")


@dataclass(frozen=True)
class Setup:
    """What every rank is told."""

    ready: Preflight
    server: RunningServer
    modes: Sequence[str]
    layer: int
    repeats: int
    folder: Path

    @property
    def policies(self) -> dict[str, Policy]:
        """Phase -> the policy that it trains."""
        return {"full": FULL, "internal": InternalLayerPolicy(self.layer)}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, start a server of it, send weights, tell and write what came out."""
    args = parse(argv)
    shape = replace(GIGABYTE, **{name: getattr(args, name) for name in SIZES})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape.write_model(folder / "model")
        config = config_of(folder, args.python, args.overrides)
        layout = check(config, None, training=False)
        ready = Preflight(config, check_model(config, training=False), layout)
        modes = [mode for mode in args.modes if mode != "ipc" or layout.world == 1]
        with running_server(config, folder) as server:
            layer = args.layer or max(1, shape.layers // 6)
            setup = Setup(ready, server, modes, layer, args.repeats, folder)
            run_ranks(measure, layout.world, setup)
        rows = json.loads((folder / "medians.json").read_text())
        most = most_bytes(config, rows[0]["sent_bytes"], layer=layer, layers=shape.layers)
    console = Console()
    console.print(
        as_table(rows, f"tp {layout.tp}, pp {layout.pp}; internal: layer {layer} of {shape.layers}")
    )
    moved = max(row["sent_bytes"] for row in rows if row["phase"] == "internal")
    verdict = f"layer {layer} moves {moved / 1e6:.1f} MB, and may move {most / 1e6:.1f}"
    console.print(f"Of {rows[0]['sent_bytes'] / 1e6:.1f} MB {verdict}.", soft_wrap=True)
    if args.json:
        report = {"layer": layer, "rows": rows, "most_bytes": most}
        report |= {"shape": asdict(shape), "layout": asdict(layout)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if moved > most:
        raise SystemExit(verdict)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--python", help="interpreter that can import sglang")
    parser.add_argument("--modes", nargs="+", default=list(TRANSPORTS), choices=list(TRANSPORTS))
    parser.add_argument("--layer", type=int, help="of the internal phase; default: a sixth of all")
    numbers = {"repeats": 3} | {f.name: getattr(GIGABYTE, f.name) for f in fields(Shape)}
    options.add_numbers(parser, {name: numbers[name] for name in ("repeats", *SIZES)})
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def config_of(folder: Path, python: str | None, overrides: Sequence[str]) -> Config:
    """A run on the model in `folder`, with a server whose cache is small beside it."""
    settings = [f"model.path={folder}/model", "data.train=none", f"sync.directory={folder}/weights"]
    settings += [*server_settings(python), "sglang.skip_tokenizer_init=true"]
    return load_config(None, [*settings, "sglang.max_total_tokens=1024", *overrides])


def most_bytes(config: Config, full: float, *, layer: int, layers: int) -> float:
    """What the internal phase may move: its share of the `full` phase's, plus the embeddings."""
    tensors = read_index(config.model.path).tensors
    ends = ("embed_tokens.weight", "lm_head.weight")
    numbers = sum(math.prod(t.shape) for name, t in tensors.items() if name.endswith(ends))
    itemsize = 4 if config.model.dtype == "float32" else 2
    return (layer + 1) / (layers + 1) * full + itemsize * numbers


def measure(setup: Setup) -> None:
    """Medians of each way and phase, as rows in a file. Every rank runs this."""
    torch.set_num_threads(1)  # of the CPU: threads that wait for a busy core would tell of others
    config, arch = setup.ready.config, setup.ready.architecture
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    with parallel.joined(setup.ready.layout, seed=0), ExitStack() as stack:
        with ExitStack() as files:
            index = read_index(config.model.path)
            actor = MegatronActor(arch, config, slice_opener(index, files))

        def weights_of(policy: Policy) -> ActorWeights:
            return ActorWeights(actor.weights, trained_units(policy, arch), lambda: None)

        syncs = {}
        for mode in setup.modes:
            syncs[mode] = WatchedSync(setup, mode, lambda: weights_of(FULL))
            stack.callback(syncs[mode].engine.close)
        for repeat in range(-1, setup.repeats):  # the first round makes groups and connections
            for mode, sync in list(syncs.items())[:: -1 if repeat % 2 else 1]:
                for phase, policy in setup.policies.items():
                    sample = sync.of(weights_of(policy))
                    if repeat >= 0:
                        samples.setdefault((mode, phase), []).append(sample)
        if dist.get_rank() == 0:
            rows = [
                {"mode": mode, "phase": phase}
                | {name: median(one[name] for one in found) for name in found[0]}
                for (mode, phase), found in samples.items()
            ]
            rows.sort(key=lambda row: setup.modes.index(row["mode"]))
            (setup.folder / "medians.json").write_text(json.dumps(with_ratios(rows)))


class WatchedSync:
    """An engine that sends by `mode`, under watch."""

    version = 0  # of the server's weights, whoever brought them

    def __init__(self, setup: Setup, mode: str, all_weights: Callable[[], Weights]) -> None:
        self.server, config = setup.server, setup.ready.config
        config = replace(
            config,
            sync=replace(config.sync, mode=mode),
            servers=replace(config.servers, addresses=[setup.server.address]),
        )
        nobody: Any = None  # reads what is never sampled
        self.engine = SGLangEngine(
            config,
            Model(setup.ready.architecture, nobody, ()),
            run_dir=setup.folder,
            current_weights=all_weights,
        )
        self.news: list[str] = []
        self.engine.wait_until_up(self.news.append)
        transport: Any = self.engine.transport
        self.send_s, self._pass_on = 0.0, transport.pass_on
        transport.pass_on = self._timed

    def _timed(self, *args: Any) -> Any:
        start = time.perf_counter()
        errors = self._pass_on(*args)
        self.send_s += time.perf_counter() - start
        return errors

    def of(self, weights: Weights) -> dict[str, float]:
        """What it takes to send `weights`: seconds and bytes. Collective."""
        self.send_s, watched = 0.0, WatchedWeights(weights)
        WatchedSync.version += 1
        start, cpu_s, server_cpu_s = together_ms(), time.process_time(), self.server.cpu_s()
        report = self.engine.load_weights(watched, version=WatchedSync.version)
        seconds = (together_ms() - start) / 1000
        if report.behind:
            raise RuntimeError("\n".join(["the server did not get its weights:", *self.news]))
        cost = over_ranks(
            {
                "sent_bytes": report.sent_bytes,
                "seconds": seconds,
                "gather_s": watched.gather_s,
                "send_s": self.send_s,
                "server_cpu_s": self.server.cpu_s() - server_cpu_s,
                "trainer_cpu_s": time.process_time() - cpu_s,
            }
        )
        return cost | {"rest_s": cost["seconds"] - cost["gather_s"] - cost["send_s"]}


class WatchedWeights:
    """`weights`, and how long it took to gather them."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.gather_s = weights, 0.0
        self.stages, self.stage, self.sends = weights.stages, weights.stage, weights.sends

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._timed(iter(self.weights))

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """As `Weights` has it."""
        return self._timed(self.weights.of_stage())

    def _timed(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        while True:
            start = time.perf_counter()
            named = next(tensors, None)
            self.gather_s += time.perf_counter() - start
            if named is None:
                return
            yield named


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with bytes and seconds over those of the full phase in the same mode."""
    full = {row["mode"]: row for row in rows if row["phase"] == "full"}
    return [
        dict(row)
        | {
            f"{name}_ratio": row[name] / full[row["mode"]][name]
            for name in ("sent_bytes", "seconds")
        }
        for row in rows
    ]


def as_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What a sync takes, and behind bytes and seconds their ratio to the full phase's."""
    table = Table("", title=title, padding=(0, 0, 0, 1))
    for heading in ("MB", "s", *PARTS):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["mode"] if row["phase"] == "full" else f"  {row['phase']}",
            f"{row['sent_bytes'] / 1e6:.1f} {row['sent_bytes_ratio']:.2f}",
            f"{row['seconds']:.2f} {row['seconds_ratio']:.2f}",
            *(f"{row[part]:.2f}" for part in PARTS.values()),
        )
    return table


if __name__ == "__main__":
    main()
