"""What does a step of an internal layer policy cost, beside one of the full policy?

    python tools/bench_phase_cost.py --json cost.json
    python tools/bench_phase_cost.py --layers 8 --pp 2 parallel.dp=2 megatron.bucket_size=200000

Layers above l are neither run nor trained, so layer l should cost about (l + 1) / (L + 1) of full
depth; the one stands for embedding and unembedding. A random Qwen3 is timed at l = 2, L/2 and L
under one layout, in one run. The depths take turns, so that whatever else the machine does meets
all of them alike, and medians are compared. What costs more than a quarter above that share is
named below the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.layout import Layout, layers_of_stages
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import model, parallel
from megatron_bupo.mcore.logprobs import chunked_logprobs
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight, check_model
from megatron_bupo.types import TokenBatch

TOLERATED = 1.25  # times the share of layers; a ratio above is explained
COLUMNS = {  # heading: milliseconds, ratio
    "old log-probs": ("old_logprobs_ms", "old_logprobs_ratio"),
    "fwd + bwd": ("forward_backward_ms", "time_ratio"),
    "optimizer": ("optimizer_ms", "optimizer_ratio"),
    "update": ("update_ms", "update_ratio"),  # the two before together
    "weight sync": ("sync_ms", "sync_ratio"),
}


@dataclass(frozen=True)
class Shape:
    """The random model and its batch."""

    layers: int = 12
    hidden: int = 128
    ffn: int = 384
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 1024
    responses: int = 16
    prompt_tokens: int = 16
    response_tokens: int = 48

    @property
    def depths(self) -> list[int]:
        """The depths to time: 2, half and all of the layers."""
        return sorted({min(2, self.layers), max(1, self.layers // 2), self.layers})

    def policy(self, depth: int) -> Policy:
        """The policy that runs `depth` layers."""
        return FULL if depth == self.layers else InternalLayerPolicy(depth)

    def write_model(self, directory: Path) -> None:
        """A Qwen3 checkpoint with random weights, the same ones each time."""
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.prompt_tokens + self.response_tokens,
            tie_word_embeddings=True,
        )
        Qwen3ForCausalLM(config).save_pretrained(directory)

    def batch(self) -> TokenBatch:
        """Random responses of full length."""
        tokens = self.prompt_tokens + self.response_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab, (self.responses, tokens), generator=generator)
        mask = (torch.arange(tokens) >= self.prompt_tokens).expand_as(ids)
        advantages = torch.randn(self.responses, 1, generator=generator) * mask
        return TokenBatch(ids, mask, torch.zeros(ids.shape), advantages)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, time it on the layout's ranks, tell and write what came out."""
    args = parse(argv)
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    with tempfile.TemporaryDirectory() as folder:
        shape.write_model(Path(folder, "model"))
        settings = (f"model.path={folder}/model", "data.train=none")
        layout_settings = (f"parallel.tp={args.tp}", f"parallel.pp={args.pp}")
        microbatch = f"trainer.microbatch_size={args.microbatch}"
        config = load_config(None, [*settings, *layout_settings, microbatch, *args.overrides])
        layout = check(config, None, training=False)
        ready = Preflight(config, check_model(config, training=False), layout)
        found = Path(folder, "medians.json")
        run_ranks(measure, layout.world, ready, shape, args.repeats, found)
        rows = with_ratios(json.loads(found.read_text()), shape.layers)
    console = Console()
    console.print(as_table(rows, layout))
    for line in explanations(rows, shape.layers, layout):
        console.print(line)
    if args.json:
        report = {"layers": shape.layers, "rows": rows}
        report |= {"shape": asdict(shape), "layout": asdict(layout)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    numbers = {"tp": 1, "pp": 1, "microbatch": 8, "repeats": 9} | asdict(Shape())
    for name, default in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other setting")
    return parser.parse_intermixed_args(argv)


def measure(ready: Preflight, shape: Shape, repeats: int, out: Path) -> None:
    """Medians of all times at each depth, as rows in `out`. Every rank runs this."""
    torch.set_num_threads(1)  # of the CPU: threads that wait for a busy core would tell of others
    with parallel.joined(ready.layout, seed=0):
        with ExitStack() as files:
            index = read_index(ready.config.model.path)
            trainer = MegatronTrainer(ready.architecture, ready.config, slice_opener(index, files))
        rows = time_depths(trainer, shape, repeats, ready.layout)
        if dist.get_rank() == 0:
            out.write_text(json.dumps(rows))


def time_depths(
    trainer: MegatronTrainer, shape: Shape, repeats: int, layout: Layout
) -> list[dict[str, float]]:
    """A row per depth: medians over repeats of the slowest rank's milliseconds."""
    batch, within = shape.batch(), watch(trainer)
    share = batch.rows(slice(shape.responses // layout.dp))
    samples: dict[int, list[dict[str, float]]] = {depth: [] for depth in shape.depths}
    for repeat in range(-1, repeats):  # the first round only warms up
        for depth in shape.depths[:: -1 if repeat % 2 else 1]:
            sample = time_policy(trainer, batch, shape.policy(depth), within)
            sample["unembedding_ms"] = time_unembedding(trainer, share)
            slowest = torch.tensor(list(sample.values()), dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if repeat >= 0:
                samples[depth].append(dict(zip(sample, slowest.tolist(), strict=True)))
    return [
        {"layer": depth} | {name: median(s[name] for s in found) for name in found[0]}
        for depth, found in samples.items()
    ]


def watch(trainer: MegatronTrainer) -> dict[str, float]:
    """Milliseconds spent inside parts of an update, added up from now on."""
    within: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now_ms()
            result = function(*args, **kwargs)
            within[name] = within.get(name, 0.0) + now_ms() - start
            return result

        return call

    optimizer: Any = trainer.optimizer
    optimizer.step = timed("optimizer_ms", optimizer.step)
    native: Any = trainer.native
    native.finalize_model_grads_func = timed("reduce_grads_ms", native.finalize_model_grads_func)
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer = timed("zero_grads_ms", chunk.zero_grad_buffer)
    return within


def time_policy(
    trainer: MegatronTrainer, batch: TokenBatch, policy: Policy, within: dict[str, float]
) -> dict[str, float]:
    """Milliseconds of the old-logprob pass, an update and a weight sync of `policy`."""
    start = together_ms()
    old, _ = trainer.logprobs(batch, policy)
    scored = together_ms()
    within.clear()
    trainer.update(batch.with_old_logprobs(old), policy, lr=1e-6)
    updated = together_ms()
    dict(trainer.changed_weights(policy))
    synced = together_ms()
    return within | {
        "old_logprobs_ms": scored - start,
        "forward_backward_ms": updated - scored - within["optimizer_ms"],
        "update_ms": updated - scored,
        "sync_ms": synced - updated,
    }


def time_unembedding(trainer: MegatronTrainer, share: TokenBatch) -> float:
    """Milliseconds for log-probs of the responses, there and back, from given hidden states."""
    chunk = model.last_chunk(trainer.gpt_chunks)
    if chunk is None:
        return 0.0
    weight = model.unembedding(chunk)
    targets = share.input_ids[share.response_mask].to(weight.device)
    hidden = torch.randn(len(targets), weight.shape[1], dtype=weight.dtype, device=weight.device)
    start = now_ms()
    logprobs, _ = chunked_logprobs(hidden.requires_grad_(), weight, targets, shard=trainer.shard)
    torch.autograd.grad(logprobs.sum(), [hidden, weight])
    return now_ms() - start


def together_ms() -> float:
    """The time when all ranks have come here."""
    dist.barrier()
    return now_ms()


def now_ms() -> float:
    """The time when all that was asked of the device is done."""
    torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def with_ratios(rows: Sequence[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """The rows with their times over those of full depth, which is the last row."""
    full = rows[-1]
    return [
        row
        | {ratio: row[ms] / full[ms] for ms, ratio in COLUMNS.values()}
        | {"share_of_layers": (row["layer"] + 1) / (layers + 1)}
        for row in rows
    ]


def as_table(rows: Sequence[dict[str, Any]], layout: Layout) -> Table:
    """Times in ms and, behind each, over full depth."""
    title = f"tp {layout.tp}, pp {layout.pp}, dp {layout.dp}: milliseconds, and over full depth"
    table = Table(title=title)
    for heading in ("layer", "share", *COLUMNS):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row[ms]:.1f} {row[ratio]:.2f}" for ms, ratio in COLUMNS.values()]
        table.add_row(str(row["layer"]), f"{row['share_of_layers']:.2f}", *cells)
    return table


def explanations(rows: Sequence[dict[str, Any]], layers: int, layout: Layout) -> list[str]:
    """Where a ratio is more than a quarter above the share of layers, and what is in it."""
    lines = []
    for row in rows[:-1]:
        limit = TOLERATED * row["share_of_layers"]
        above = [f"{name} {row[r]:.2f}" for name, (_, r) in COLUMNS.items() if row[r] > limit]
        if above:
            lines.append(f"Layer {row['layer']} is above {limit:.2f}: {', '.join(above)}.")
    if not lines:
        return []
    low = rows[0]
    lines.append(
        f"Of the {low['update_ms']:.1f} ms of an update at layer {low['layer']}, no depth saves "
        f"the unembedding's {low['unembedding_ms']:.1f} nor the {low['zero_grads_ms']:.1f} that "
        f"zero the gradients; to sum them over ranks, with waiting for the others, takes "
        f"{low['reduce_grads_ms']:.1f}. The optimizer's gradient norm runs over all parameters."
    )
    if layout.pp > 1:
        stage = len(layers_of_stages(layers, layout, {})[0][0])
        lines.append(
            f"The first {stage} layers are on one pipeline stage: while they alone work, the "
            "other stages wait."
        )
    return lines


if __name__ == "__main__":
    main()
