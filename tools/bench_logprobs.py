"""What do log-probs cost without ever holding the logits of all rows?

    python tools/bench_logprobs.py --json logprobs.json
    python tools/bench_logprobs.py --device cuda --dtype bfloat16 --rows 16384 --hidden 2560 \\
        --chunk 1024 --repeats 20

`mcore/logprobs.py`, chunk by chunk, beside logits -> log_softmax -> gather over the whole
vocabulary (Qwen3's unless told otherwise). Either adds the unembedding's gradient to an fp32
buffer, as training does. Each lives in a process of its own, whose peak memory is thus its own:
beyond weights, hidden states and that buffer, but with every gradient on its way there. The
processes take turns, so that whatever else the machine does meets both alike, and medians are
compared.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.mcore.logprobs import VocabShard, chunked_logprobs
from tools.resident import forget_peak, resident_bytes
from tools.workers import Worker

VARIANTS = WHOLE, CHUNKED = "materialised", "chunked"
FORWARD, BOTH = "forward", "forward_backward"
LOGPROBS = "logprobs"
M_MMAP_THRESHOLD = -3  # malloc.h
COLUMNS = (  # heading, figure, unit
    ("forward, ms", "forward_ms", 1),
    ("fwd + bwd, ms", "forward_backward_ms", 1),
    ("forward, MiB", "forward_peak_bytes", 2**20),
    ("fwd + bwd, MiB", "forward_backward_peak_bytes", 2**20),
)
Outputs = tuple[Tensor, Tensor]  # log-probs and entropies, `[rows]` each


def main(argv: Sequence[str] | None = None) -> None:
    """Let the two take turns, and tell what came out."""
    args = parse(argv)
    with ExitStack() as stack:
        workers = {k: stack.enter_context(Worker(serve, k, args, True)) for k in VARIANTS}
        figures = peaks(workers)
    with ExitStack() as stack:
        workers = {k: stack.enter_context(Worker(serve, k, args, False)) for k in VARIANTS}
        times = medians(workers, args.repeats)
        answers = [torch.tensor(worker.ask(LOGPROBS)["logprobs"]) for worker in workers.values()]
    report: dict[str, Any] = {kind: figures[kind] | times[kind] for kind in VARIANTS}
    whole, chunked = report[WHOLE], report[CHUNKED]
    report["ratio"] = {name: chunked[name] / whole[name] for name in whole}
    report["largest_difference_nats"] = float((answers[0] - answers[1]).abs().max())
    report["options"] = {name: value for name, value in vars(args).items() if name != "json"}
    row = 4 * args.vocab
    report["logits_bytes"] = {WHOLE: row * args.rows, CHUNKED: row * min(args.chunk, args.rows)}
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="response tokens")
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden states")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=64, help="rows of logits at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--entropy", action="store_true", help="entropies and their gradient too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def peaks(workers: dict[str, Worker]) -> dict[str, dict[str, float]]:
    """The most bytes held at once. A process's peak only grows, so the lower one comes first."""
    return {
        kind: {f"{what}_peak_bytes": worker.ask(what)["peak_bytes"] for what in (FORWARD, BOTH)}
        for kind, worker in workers.items()
    }


def medians(workers: dict[str, Worker], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds, of workers that take turns."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in workers}
    for what in (FORWARD, BOTH):
        for worker in workers.values():
            worker.ask(what)  # to warm up
        rounds = [{k: w.ask(what)["ms"] for k, w in workers.items()} for _ in range(repeats)]
        for kind, times in found.items():
            times[f"{what}_ms"] = median(one[kind] for one in rounds)
    return found


def print_report(report: dict[str, Any]) -> None:
    """The figures, for a reader."""
    console, table = Console(), Table()
    for heading in ("", *(heading for heading, _, _ in COLUMNS)):
        table.add_column(heading, justify="right")
    for kind in VARIANTS:
        table.add_row(kind, *(f"{report[kind][name] / unit:.1f}" for _, name, unit in COLUMNS))
    table.add_row("ratio", *(f"{report['ratio'][name]:.3f}" for _, name, _ in COLUMNS))
    console.print(table)
    whole, chunk = (report["logits_bytes"][kind] / 2**20 for kind in (WHOLE, CHUNKED))
    console.print(f"fp32 logits: {whole:.1f} MiB for all rows, {chunk:.1f} MiB for a chunk.")
    console.print(f"Log-probs differ by {report['largest_difference_nats']:.0e} nats at most.")


def serve(connection: Connection, kind: str, args: argparse.Namespace, sparing: bool) -> None:
    """A worker's life: asked for FORWARD, BOTH or LOGPROBS it does that once and tells `ms`,
    `peak_bytes` and, for LOGPROBS, those. If `sparing`, malloc gives blocks of 1 MiB and more back
    as they are freed: what the process holds is then what lives.
    """
    if sparing:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**vars(args) | {"rows": 2, "vocab": 64})
    problem(kind, small)(BOTH)  # what libraries allocate once
    work = problem(kind, args)
    before = memory(args.device)
    while True:
        what = connection.recv()
        finish(args.device)
        start = time.perf_counter()
        logprobs = work(what)
        finish(args.device)
        answer: dict[str, Any] = {"ms": 1000 * (time.perf_counter() - start)}
        answer["peak_bytes"] = memory(args.device, peak=True) - before
        if what == LOGPROBS:
            answer["logprobs"] = logprobs.tolist()
        connection.send(answer)


def problem(kind: str, args: argparse.Namespace) -> Callable[[str], Tensor]:
    """A function that computes log-probs one way, with gradients where BOTH is asked for."""
    options: Any = {"dtype": getattr(torch, args.dtype), "device": args.device}
    torch.manual_seed(0)
    hidden = torch.empty(args.rows, args.hidden, **options).normal_().requires_grad_()
    values = torch.empty(args.vocab, args.hidden, **options).normal_(std=args.hidden**-0.5)
    weight: Any = torch.nn.Parameter(values)
    # Not zeros, whose pages do not exist until they are written.
    weight.main_grad = torch.ones_like(values, dtype=torch.float32)
    weight.register_post_accumulate_grad_hook(add_to_main_grad)
    targets = torch.randint(args.vocab, (args.rows,), device=args.device)
    solve = materialised if kind == WHOLE else chunked

    def work(what: str) -> Tensor:
        with torch.set_grad_enabled(what == BOTH):
            logprobs, entropies = solve(hidden, weight, targets, args)
        if what == BOTH:
            hidden.grad = None
            (logprobs.sum() + entropies.sum() if args.entropy else logprobs.sum()).backward()
        return logprobs.detach()

    return work


def add_to_main_grad(weight: Any) -> None:
    """What the hook of Megatron's DDP does."""
    weight.main_grad.add_(weight.grad)
    weight.grad = None


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor, args: Any) -> Outputs:
    """As one writes it down."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    entropies = -(log_p.exp() * log_p).sum(-1) if args.entropy else log_p.new_zeros(args.rows)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, args: Any) -> Outputs:
    """As the actor does it."""
    shard = VocabShard(first=0, valid=args.vocab, group=None)
    return chunked_logprobs(
        hidden, weight, targets, shard=shard, chunk_tokens=args.chunk, with_entropy=args.entropy
    )


def finish(device: str) -> None:
    """Wait for what runs on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str, *, peak: bool = False) -> int:
    """Bytes that this process holds, or the most it ever held since it asked for the former."""
    if device == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not peak:
        forget_peak()
    return resident_bytes(peak=peak)


if __name__ == "__main__":
    main()
