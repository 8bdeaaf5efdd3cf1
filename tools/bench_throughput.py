"""How fast does the actor train, in tokens a second and of the hardware's peak, in either phase?

    python tools/bench_throughput.py --model 4b --peak-tflops 989 model.dtype=bfloat16
    python tools/bench_throughput.py --model tiny --responses 16 --json throughput.json

Random weights of a known shape, made in place, and random responses. A row per depth: the target
layer at a sixth of the model, then the full policy. Tokens are those of prompts and responses, as
the model runs them; FLOPs are the model's own (matrices and causal attention of the layers that
run, the unembedding of response tokens; backward twice the forward; nothing for recomputation), so
their rate over the peak is model FLOPs utilisation. Memory is the peak of the slowest rank's device
allocator, on a CPU of its resident set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight
from megatron_bupo.types import TokenBatch
from tools import options
from tools.resident import forget_peak, resident_bytes

# layers, hidden, ffn, heads, key-value heads, head size, vocabulary, tied: Qwen3's
SHAPES = {
    "tiny": (12, 128, 384, 4, 2, 32, 1024, True),
    "0.6b": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7b": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "4b": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "8b": (36, 4096, 12288, 32, 8, 128, 151936, False),
}


@dataclass(frozen=True)
class Load:
    """What a step works through."""

    responses: int
    prompt_tokens: int
    response_tokens: int
    repeats: int

    def batch(self, vocab: int) -> TokenBatch:
        """Random responses, of full length down to half of it."""
        width = self.prompt_tokens + self.response_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (self.responses, width), generator=generator)
        ends = width - torch.randint(
            self.response_tokens // 2 + 1, (self.responses, 1), generator=generator
        )
        place = torch.arange(width)
        mask = (place >= self.prompt_tokens) & (place < ends)
        advantages = torch.randn(self.responses, 1, generator=generator) * mask
        return TokenBatch(ids, mask, torch.zeros(ids.shape), advantages)


@dataclass(frozen=True)
class RandomSlice:
    """A tensor of random weights with the face of a safetensors slice."""

    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        """Sizes of all dimensions."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        shape = torch.empty(self.shape, device="meta")[index].shape
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, device=cpu.device()).mul_(0.02)


def main(argv: Sequence[str] | None = None) -> None:
    """Build the model, time it on the layout's ranks, tell and write what came out."""
    args = parse(argv)
    load = Load(args.responses, args.prompt_tokens, args.response_tokens, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        arch = architecture(args.model, load, Path(folder))
        config = load_config(None, ["model.path=random", "data.train=none", *args.overrides])
        layout = check(config, None, training=False)
        check_against_model(config, arch, training=False)
        found = Path(folder, "rows.json")
        run_ranks(measure, layout.world, Preflight(config, arch, layout), load, found)
        rows = json.loads(found.read_text())
    for row in rows:
        row["mfu"] = row["tflops_per_rank"] / args.peak_tflops if args.peak_tflops else None
    Console().print(as_table(rows, f"{args.model}, {layout.world} rank(s), {config.model.dtype}"))
    if args.json:
        report = {"model": args.model, "load": asdict(load), "layout": asdict(layout), "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="tiny", help="default: %(default)s")
    parser.add_argument(
        "--peak-tflops", type=float, help="of one rank's device, e.g. 989: H100 and H200 in bf16"
    )
    numbers = {"responses": 64, "prompt_tokens": 256, "response_tokens": 1024, "repeats": 3}
    options.add_numbers(parser, numbers)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def architecture(name: str, load: Load, folder: Path) -> Architecture:
    """The Qwen3 of that size."""
    layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied = SHAPES[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": load.prompt_tokens + load.response_tokens,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def measure(ready: Preflight, load: Load, out: Path) -> None:
    """A row per depth, written by the first rank. Every rank runs this."""
    arch = ready.architecture
    assert isinstance(arch, Architecture)
    shapes = expected_tensors(arch)
    with parallel.joined(ready.layout, seed=0):
        trainer = MegatronTrainer(arch, ready.config, lambda name: RandomSlice(shapes[name]))
        batch = load.batch(arch.vocab_size)
        policies = [InternalLayerPolicy(max(1, arch.layers // 6)), FULL]
        rows = [time_policy(trainer, batch, policy, load.repeats) for policy in policies]
        if dist.get_rank() == 0:
            out.write_text(json.dumps(rows))


def time_policy(
    trainer: MegatronTrainer, batch: TokenBatch, policy: Policy, repeats: int
) -> dict[str, Any]:
    """Medians over repeats of an old-logprob pass and an update, together."""
    torch.cuda.reset_peak_memory_stats()
    forget_peak()
    samples = []
    for _ in range(1 + repeats):  # the first warms up
        dist.barrier()
        start = time.perf_counter()
        old, _ = trainer.logprobs(batch, policy)
        trainer.update(batch.with_old_logprobs(old), policy, lr=1e-6)
        torch.cuda.synchronize()
        dist.barrier()
        samples.append(time.perf_counter() - start)
    seconds = median(samples[1:])
    assert isinstance(trainer.arch, Architecture)
    flops = 4 * forward_flops(trainer.arch, batch, policy)  # forward; forward and backward
    tokens = int((batch.response_mask * torch.arange(batch.input_ids.shape[1])).amax(1).sum())
    ranks = dist.get_world_size()
    return {
        "layer": policy.layer if isinstance(policy, InternalLayerPolicy) else trainer.arch.layers,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_rank": flops / seconds / ranks / 1e12,
        "peak_memory_bytes": peak_memory(),
    }


def forward_flops(arch: Architecture, batch: TokenBatch, policy: Policy) -> float:
    """Floating-point operations of the forward pass of `batch`, two to a multiply-add."""
    lengths = (batch.response_mask * torch.arange(batch.input_ids.shape[1])).amax(1).double()
    matrices = {name: s for name, s in expected_tensors(arch).items() if len(s) == 2}
    in_a_layer = sum(r * c for n, (r, c) in matrices.items() if n.startswith("model.layers.0."))
    layers = policy.layer if isinstance(policy, InternalLayerPolicy) else arch.layers
    attention = 2 * arch.heads * arch.head_dim * float(lengths.square().sum())  # causal: half
    unembedding = 2 * arch.vocab_size * arch.hidden_size * int(batch.response_mask.sum())
    return layers * (2 * in_a_layer * float(lengths.sum()) + attention) + unembedding


def peak_memory() -> int:
    """Bytes, of the rank that has most."""
    if torch.cuda.is_available():
        mine = torch.cuda.max_memory_allocated()
    else:
        mine = resident_bytes(peak=True)
    most = torch.tensor(mine, device=cpu.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def as_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A row per depth, speeds over that of full depth behind them."""
    table = Table(title=title)
    for heading in ("layers run", "s", "tokens/s", "over full", "TFLOP/s a rank", "MFU", "memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / rows[-1]['tokens_per_s']:.2f}",
            f"{row['tflops_per_rank']:.3g}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    return table


if __name__ == "__main__":
    main()
