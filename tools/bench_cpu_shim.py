"""What does it cost to run Megatron-Core without CUDA?

    python tools/bench_cpu_shim.py --json shim.json

`mcore/cpu.py` replaces the few names that ask for CUDA. A TorchFunctionMode could answer for them
as well, but sees every call of torch. Both run the demo's model here, beside transformers, which
needs neither. Each lives in a process of its own, for neither can be taken back; the processes
take turns at one round each, so that whatever else the machine does meets all of them alike, and
medians are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.bed.prepare import make_bed
from megatron_bupo.build import build
from megatron_bupo.config import load_config
from megatron_bupo.mcore import cpu
from megatron_bupo.mcore.packed import Packing, Split
from megatron_bupo.preflight import preflight
from megatron_bupo.train import train_step
from tools import options
from tools.workers import Worker

DEMO = Path(__file__).parents[1] / "conf" / "demo.yaml"
NAMES, MODE, PLAIN = "patched names", "function mode", "transformers"
BATCHES = {"fwd + bwd, 1 response": 1, "fwd + bwd, 64 responses": 64}  # the second: a minibatch
BED_STEP = "step of the bed"
Work = dict[str, Callable[[], object]]  # by what it is


class CudaOnCpu(TorchFunctionMode):
    """The factories and methods that `mcore/cpu.py` replaces, told apart at every call of torch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = cpu.CPU
            kwargs.pop("pin_memory", None)
        if func == Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], cpu.CPU, *args[2:])
        answer = func(*args, **kwargs)
        if func == Tensor.type and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def main(argv: Sequence[str] | None = None) -> None:
    """Let the three take turns, and tell what came out."""
    args = parse(argv)
    make_bed(args.bed)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {
            kind: stack.enter_context(Worker(serve, kind, args.bed, Path(folder, str(i))))
            for i, kind in enumerate((NAMES, MODE, PLAIN))
        }
        rows = compare(workers, args.repeats)
    console, table = Console(), Table(title="milliseconds, and over the patched names")
    for heading in ("", NAMES, MODE, PLAIN):
        table.add_column(heading, justify="right")
    for row in rows:
        kinds = (NAMES, MODE, PLAIN)
        cells = [f"{row['ms'][k]:.1f} {row['ratio'][k]:.2f}" for k in kinds if k in row["ms"]]
        table.add_row(row["what"], *cells)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    options.add_bed(parser)
    return parser.parse_args(argv)


def compare(workers: dict[str, Worker], repeats: int) -> list[dict[str, Any]]:
    """For each thing to do, medians by worker and their ratios to the patched names'."""
    rows, can = [], {kind: worker.hear() for kind, worker in workers.items()}
    for what in (*BATCHES, BED_STEP):
        able = {kind: worker for kind, worker in workers.items() if what in can[kind]}
        times: dict[str, list[float]] = {kind: [] for kind in able}
        for repeat in range(-2, repeats):  # the first rounds only warm up
            for kind, worker in able.items():
                ms = worker.ask(what)
                if repeat >= 0:
                    times[kind].append(ms)
        ms = {kind: median(found) for kind, found in times.items()}
        ratio = {kind: value / ms[NAMES] for kind, value in ms.items()}
        rows.append({"what": what, "ms": ms, "ratio": ratio})
    return rows


def serve(connection: Connection, kind: str, bed: Path, run_dir: Path) -> None:
    """A worker's life, with the demo's model and one kind of shim: it says what it can do, and then
    does that as it is asked to and tells the milliseconds.
    """
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        work = plain_work(bed) if kind == PLAIN else megatron_work(kind, bed, run_dir, stack)
        connection.send(list(work))
        while True:
            what = connection.recv()
            start = time.perf_counter()
            work[what]()
            connection.send(1000 * (time.perf_counter() - start))


def megatron_work(kind: str, bed: Path, run_dir: Path, stack: ExitStack) -> Work:
    """The demo's run on one rank, under one shim or the other."""
    if kind == MODE:
        for part in ("_patch_factories", "_patch_tensor"):
            setattr(cpu, part, lambda: None)
        stack.enter_context(CudaOnCpu())
    layout = ("parallel.pp=1", "trainer.microbatch_size=64", "bupo.internal_steps=0")
    paths = (f"model.path={bed}/model", f"data.train={bed}/train.jsonl", "prepare=null")
    quiet = ("evaluation.every=0", "logging.tensorboard=false", "data.eval=null")
    quiet += (f"run_dir={run_dir}",)
    run = build(preflight(load_config(str(DEMO), [*layout, *paths, *quiet]), None))
    stack.push(run)
    (gpt,) = run.trainer.gpt_chunks
    steps = count()

    def bed_step() -> None:
        step = next(steps)
        train_step(run, step, run.policy_for(step))

    def logits(ids: Tensor) -> Tensor:
        row = Packing([ids.shape[1]] * len(ids), ids.numel(), Split()).row(cpu.CPU)
        positions = row.positions.unsqueeze(0)
        return gpt(ids.reshape(1, -1), positions, None, packed_seq_params=row).view(*ids.shape, -1)

    return forward_backward(logits) | {BED_STEP: bed_step}


def plain_work(bed: Path) -> Work:
    """The same model in transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(bed / "model", local_files_only=True)
    return forward_backward(lambda ids: model(ids, use_cache=False).logits)


def forward_backward(logits: Callable[[Tensor], Tensor]) -> Work:
    """Gradients of a loss of `logits(ids) [responses, tokens, vocabulary]`, for each batch."""

    def work(ids: Tensor) -> None:
        predicted = logits(ids)[:, :-1].log_softmax(-1)
        predicted.gather(-1, ids[:, 1:, None]).mean().backward()

    ids = torch.randint(16, (max(BATCHES.values()), 21), generator=torch.Generator().manual_seed(0))
    return {name: partial(work, ids[:size]) for name, size in BATCHES.items()}


if __name__ == "__main__":
    main()
