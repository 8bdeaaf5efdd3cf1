"""How much memory and time does a conversion take, as the model grows?

    python tools/bench_conversion.py --gigabytes 1 2 4 --json conversion.json
    python tools/bench_conversion.py --gigabytes 2 parallel.tp=4 parallel.pp=2

Synthetic Qwen3 checkpoints in bfloat16, of more and more equal layers, go to torch_dist under the
layout given and back, each direction in a process of its own that does what the command line does.
Told of each, beside the sizes of a layer and of the largest tensor, are two peaks: of the resident
set, which counts pages of files that are mapped for reading and that the kernel takes back when it
likes, and of its anonymous part, which is what must fit. Both are counted from what the process has
before it begins, mostly torch and Megatron-Core (`all`: with that). The anonymous one must not grow
with the model: the tool fails if it passes `--limit` times the largest tensor and a layer.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.hf.writer import ShardPlan

GIGABYTE = 10**9
SHARD_BYTES = 500_000_000
SHARDS = ("--shard-bytes", SHARD_BYTES)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65_536,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Measured:
    """One conversion; bytes, seconds."""

    direction: str
    model_bytes: int
    layer_bytes: int
    largest_tensor_bytes: int
    seconds: float
    before_anonymous: int
    before_resident: int
    peak_anonymous: int
    peak_resident: int

    @property
    def anonymous(self) -> int:
        """What the conversion itself needed at most."""
        return self.peak_anonymous - self.before_anonymous

    @property
    def resident(self) -> int:
        """The same with pages of mapped files."""
        return self.peak_resident - self.before_resident


def main() -> int:
    """Measure and tell; 1 where memory grows with the model."""
    args = read_arguments()
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        for gigabytes in args.gigabytes:
            measured += measure(Path(folder), int(gigabytes * GIGABYTE), args.layout)
    show(measured)
    if args.json:
        rows = [asdict(m) | {"anonymous": m.anonymous, "resident": m.resident} for m in measured]
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    limit = args.limit * max(m.largest_tensor_bytes + m.layer_bytes for m in measured)
    return int(any(m.anonymous > limit for m in measured))


def read_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description="Memory and time of conversions.")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--directory", help="with room for three models; default: that of /tmp")
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("layout", nargs="*", default=["parallel.tp=2", "parallel.pp=2"])
    return parser.parse_args()


def measure(folder: Path, model_bytes: int, layout: Sequence[str]) -> list[Measured]:
    """Both directions for a model of about `model_bytes`."""
    model_dir, there, back = (folder / name for name in ("hf", "torch_dist", "back"))
    sizes = make_checkpoint(model_dir, model_bytes)
    needed = 3 * sizes["model_bytes"]
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"needs {needed / GIGABYTE:.1f} GB of disk in {folder}")
    commands = {
        "to Megatron": ["hf-to-megatron", "--hf", model_dir, "--out", there, *layout],
        "to HF": ["megatron-to-hf", "--megatron", there, "--out", back, *SHARDS],
    }
    done = []
    for direction, command in commands.items():
        pipe, theirs = get_context("spawn").Pipe()
        words = ["convert", *map(str, command)]
        process = get_context("spawn").Process(target=convert, args=(words, theirs))
        process.start()
        theirs.close()  # so that its end is seen
        try:
            done.append(Measured(direction=direction, **sizes, **pipe.recv()))
        except EOFError:
            raise SystemExit(f"{direction} has failed") from None
        process.join()
    for path in sorted(model_dir.iterdir()):
        if not filecmp.cmp(path, back / path.name, shallow=False):
            raise SystemExit(f"{path.name} did not come back as it was")
    for path in (model_dir, there, back):
        shutil.rmtree(path)
    return done


def make_checkpoint(model_dir: Path, model_bytes: int) -> dict[str, int]:
    """An HF checkpoint of noise, about as large as that; its sizes."""
    model_dir.mkdir()
    config = model_dir / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    shapes = expected_tensors(read_architecture(model_dir))
    layer = 2 * sum(prod(s) for name, s in shapes.items() if ".layers." in name)
    rest = 2 * sum(map(prod, shapes.values())) - layer
    layers = max(4, 4 * round((model_bytes - rest) / layer / 4))  # a pipeline of 4 stages divides
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2) + "\n")
    plan = ShardPlan("BF16", expected_tensors(read_architecture(model_dir)), SHARD_BYTES)
    noise = os.urandom(2**20).replace(b"\x7f", b"\x3f").replace(b"\xff", b"\xbf")  # finite in bf16
    for file, names in plan.files().items():
        head, _ = plan.header(names)
        with (model_dir / file).open("wb") as opened:
            opened.write(head)
            left = sum(map(plan.bytes_of, names))
            while left:
                left -= opened.write(noise[: min(left, len(noise))])
    if index := plan.index():
        (model_dir / "model.safetensors.index.json").write_text(index)
    largest = max(map(plan.bytes_of, plan.tensors))
    return {
        "model_bytes": plan.total_bytes(),
        "layer_bytes": layer,
        "largest_tensor_bytes": largest,
    }


def convert(argv: list[str], pipe: Any) -> None:
    """In a process of its own: `megatron-bupo ARGV`, watched."""
    import megatron_bupo.convert  # what would be loaded on the way
    from megatron_bupo.cli import main

    del megatron_bupo
    before, peaks, ended = memory(), {"Anonymous": 0, "Rss": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            for key, value in memory().items():
                peaks[key] = max(peaks[key], value)

    watching = threading.Thread(target=watch)
    watching.start()
    begin = time.perf_counter()
    code = main(argv)
    seconds = time.perf_counter() - begin
    ended.set()
    watching.join()
    if code:
        os._exit(code)
    pipe.send(
        {
            "seconds": seconds,
            "before_anonymous": before["Anonymous"],
            "before_resident": before["Rss"],
            "peak_anonymous": peaks["Anonymous"],
            "peak_resident": peaks["Rss"],
        }
    )


def memory() -> dict[str, int]:
    """Bytes of this process that are resident, and those of them that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if " kB" in line}
    return {"Rss": found["VmRSS"], "Anonymous": found["RssAnon"]}


def show(measured: Sequence[Measured]) -> None:
    """A table of all conversions."""
    table = Table(title="Memory in MB, beside what the process has before it begins")
    for heading in ("", "model GB", "layer", "tensor", "anonymous", "resident", "all"):
        table.add_column(heading, justify="right")
    table.add_column("MB/s", justify="right")
    for m in measured:
        numbers = (m.layer_bytes, m.largest_tensor_bytes, m.anonymous, m.resident, m.peak_resident)
        table.add_row(
            m.direction,
            f"{m.model_bytes / GIGABYTE:.2f}",
            *(f"{number / 1e6:.0f}" for number in numbers),
            f"{m.model_bytes / m.seconds / 1e6:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
