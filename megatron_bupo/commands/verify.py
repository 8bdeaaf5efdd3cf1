"""`megatron-bupo convert verify`: two checkpoints side by side, as a table and a verdict."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.launch.local import under_torchrun

if TYPE_CHECKING:
    from megatron_bupo.verification.compare import Report
    from megatron_bupo.verification.logprobs import Question
    from megatron_bupo.verification.sides import Side

SHOWN = 20  # differences in the table; the file has all
MOST_BYTES = 2**33  # of one side's log-probs
USAGE = "give two: FIRST SECOND, or --hf DIR --megatron DIR"


def run(args: Namespace) -> None:
    """Compare the two checkpoints; RunStopped where they differ."""
    named, overrides = read_words(args)
    out = None if args.json is None else _writable(args.json)
    if under_torchrun():
        raise InputError("torchrun", "verification starts its ranks itself", "start it once")
    from megatron_bupo.verification.compare import compare

    with ExitStack() as stack:
        first, second = open_both(named, stack)
        question = read_question(args, first, second, overrides)
        report = compare(first, second, question)
    show(report, first, second)
    if out is not None:
        record = {"first": str(first.path), "second": str(second.path), "same": report.same}
        out.write_text(json.dumps(_plain(record | asdict(report)), indent=2) + "\n")
    if not report.same:
        worst, count = report.differences[0], len(report.differences)
        raise RunStopped(f"{count} differences, the worst: {worst.kind} of {worst.name}")


def read_words(args: Namespace) -> tuple[list[tuple[str | None, Path]], list[str]]:
    """The two checkpoints, each with its kind if that is given, and the overrides, which stand in
    any order.
    """
    named = [w for w in args.overrides if "=" not in w or Path(expand(w)).exists()]
    overrides = [word for word in args.overrides if word not in named]
    asked = [(None, word) for word in named] + [("hf", args.hf), ("megatron", args.megatron)]
    chosen = [(kind, Path(expand(word))) for kind, word in asked if word is not None]
    if len(chosen) != 2:
        raise InputError("command line", f"{len(chosen)} checkpoints are named", USAGE)
    return chosen, overrides


def open_both(named: Sequence[tuple[str | None, Path]], stack: ExitStack) -> list[Side]:
    """The two checkpoints; config.json of a Megatron one that has none is that of the HF one."""
    from megatron_bupo.verification.sides import is_megatron, open_hf, open_megatron

    megatron = [kind == "megatron" or (kind is None and is_megatron(p)) for kind, p in named]
    hf = next((path for (_, path), is_it in zip(named, megatron, strict=True) if not is_it), None)
    return [
        open_megatron(path, stack, hf) if is_it else open_hf(path, stack)
        for (_, path), is_it in zip(named, megatron, strict=True)
    ]


def _writable(name: str) -> Path:
    out = Path(expand(name))
    if not out.parent.is_dir() or out.is_dir():
        reason = f"{out.parent} is not a directory" if not out.is_dir() else "is a directory"
        raise InputError(f"--json {name}", reason, "name a file in one that exists")
    return out


def read_question(
    args: Namespace, first: Side, second: Side, overrides: Sequence[str]
) -> Question | None:
    """What the models are asked, and under which layout."""
    import torch

    from megatron_bupo.verification.logprobs import Question

    if args.tokens < 2:
        raise InputError(
            f"--tokens {args.tokens}", "nothing follows the first token", "choose more"
        )
    if not (math.isfinite(args.tolerance) and args.tolerance >= 0):
        raise InputError(f"--tolerance {args.tolerance}", "is no tolerance", "choose e.g. 1e-5")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}", "is no seed", "choose 0 or more")
    megatron = [side for side in (first, second) if side.torch_dist is not None]
    if overrides and (args.no_logits or not megatron):
        reason = "there is no Megatron checkpoint to lay out" if not megatron else "--no-logits"
        raise InputError(overrides[0], reason, "leave it out")
    if args.no_logits:
        return None
    from megatron_bupo.commands.convert import read_layout

    config, layout = read_layout(overrides, (megatron or [first])[0].architecture)
    config = replace(config, model=replace(config.model, dtype="float32"))
    architectures = (first.architecture, second.architecture)
    vocab = min(architecture.vocab_size for architecture in architectures)
    tokens = min(args.tokens, *(architecture.max_positions for architecture in architectures))
    bytes_ = 4 * args.sequences * tokens * vocab
    if bytes_ > MOST_BYTES:
        reason = f"log-probs of {vocab} tokens at so many positions are {bytes_ / 2**30:.0f} GiB"
        where = f"--sequences {args.sequences} --tokens {args.tokens}"
        raise InputError(where, reason, "choose fewer")
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, vocab, (args.sequences, tokens), generator=generator)
    return Question(ids, args.tolerance, config, layout)


def show(report: Report, first: Side, second: Side) -> None:
    """The table of differences, what was compared, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=max(200, Console().width), highlight=False, soft_wrap=True)
    for name, side in (("first ", first), ("second", second)):
        kind = "HF directory" if side.torch_dist is None else "Megatron checkpoint"
        console.print(f"{name}  {kind} {escape(str(side.path))}")
    if report.differences:
        table = Table(box=box.SIMPLE)
        for heading in ("what", "of", "first", "second", "largest difference"):
            table.add_column(heading)
        for found in report.differences[:SHOWN]:
            largest = "" if found.largest is None else f"{found.largest:.3g}"
            cells = (found.kind, found.name, found.first, found.second, largest)
            table.add_row(*map(escape, cells))
        console.print(table)
        if (left := len(report.differences) - SHOWN) > 0:
            console.print(f"and {left} more")
    unequal = {found.name for found in report.differences if found.kind in {"values", "dtype"}}
    shapes = {found.name for found in report.differences if found.kind == "shape"}
    equal = report.tensors - len(unequal | shapes)
    console.print(f"tensors    {equal} of {report.tensors} in both are bit-equal")
    if report.computed is not None:
        seen = report.computed
        console.print(
            f"log-probs  of the whole vocabulary at {seen.positions} positions, float32: at most "
            f"{seen.largest_nats:.1e} nats apart, {seen.largest_relative:.1e} of the largest "
            f"there (allowed {seen.tolerance:.0e})"
        )
    for note in report.notes:
        console.print(f"note       {escape(note)}")
    console.print("verdict    same" if report.same else "verdict    different")


def _plain(value: Any) -> Any:
    """`value` with infinities as text, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
