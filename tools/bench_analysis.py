"""How fast and how thrifty is `megatron-bupo analyze` beside a straightforward script?

    python tools/bench_analysis.py --json analysis.json
    python tools/bench_analysis.py --model models/smollm2 --responses 4

The script is transformers with `output_hidden_states` and a hook on each module: for each layer the
logits of all response tokens, their log-softmax, and from that entropies, KL and agreement, with a
batch of all texts and with one text at a time. Same texts, same numbers, one run, in which they
take turns (tools/turns.py). Memory is how far the resident set rises within a round, beyond the
weights; CPU seconds (of one thread) tell of the work even where the machine is busy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.residual_readings import ResidualReader
from megatron_bupo.preflight import check_model
from megatron_bupo.types import TokenBatch
from tools import options
from tools.turns import MEASURED, Turns, Variant, medians_in_turns

OURS = "megatron_bupo"
AGREE = 1e-4  # nats, of means over tokens and layers


def main(argv: Sequence[str] | None = None) -> None:
    """Let them take turns, and tell what came out."""
    args = parse(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_model(Path(folder, "model"), args)
        batch = random_batch(args)
        variants: dict[str, Variant] = {
            "script, all texts": partial(script, model, batch, len(batch)),
            "script, one text": partial(script, model, batch, 1),
            OURS: partial(ours, model, batch, args.overrides),
        }
        found = medians_in_turns(variants, args.rounds, Path(folder))
    for name in found[OURS].keys() - set(MEASURED):
        values = {who: numbers[name] for who, numbers in found.items()}
        if max(values.values()) - min(values.values()) > AGREE:
            raise SystemExit(f"the mean {name} differs, so speed tells nothing: {values}")
    versions = {name: version(name) for name in ("transformers", "torch", "megatron-core")}
    rows = [{"who": who, **numbers} for who, numbers in found.items()]
    Console().print(as_table(rows, versions))
    if args.json:
        tokens = batch.response_tokens
        report = {"rows": rows, "versions": versions, "response_tokens": tokens}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: random weights")
    sizes = {"layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152}
    texts = {"responses": 4, "prompt_tokens": 16, "response_tokens": 128, "rounds": 1}
    options.add_numbers(parser, sizes | texts)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def write_model(directory: Path, args: argparse.Namespace) -> Path:
    """A Llama checkpoint with random weights; by default of SmolLM2-135M's sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def random_batch(args: argparse.Namespace) -> TokenBatch:
    """Texts of one length, so that the script pads nothing."""
    tokens = args.prompt_tokens + args.response_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args.vocab, (args.responses, tokens), generator=generator)
    mask = (torch.arange(tokens) >= args.prompt_tokens).expand_as(ids)
    return TokenBatch(ids, mask, torch.zeros(ids.shape))


def ours(model: Path, batch: TokenBatch, overrides: Sequence[str], turns: Turns) -> None:
    """What `analyze` does with a batch."""
    config = load_config(None, [f"model.path={model}", *overrides])
    arch = check_model(config, training=False)
    assert isinstance(arch, Architecture)
    with parallel.joined(check(config, None, training=False), seed=0):
        with ExitStack() as files:
            reader = ResidualReader(arch, config, slice_opener(read_index(model), files))
        while True:
            turns.wait()
            columns = reader.read(batch).of_layers()
            turns.stop()
            turns.tell(**{name: float(values.mean()) for name, values in columns.items()})


@torch.no_grad()
def script(path: Path, batch: TokenBatch, at_once: int, turns: Turns) -> None:
    """The straightforward way, `at_once` texts at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {}
    for layer in model.model.layers:
        modules = {
            "attention_input": layer.input_layernorm,
            "attention": layer.self_attn,
            "ffn_input": layer.post_attention_layernorm,
            "ffn": layer.mlp,
        }
        for name, module in modules.items():
            module.register_forward_hook(partial(_keep, seen.setdefault(name, [])))
    while True:
        turns.wait()
        parts = []
        for start in range(0, len(batch), at_once):
            some = batch.rows(slice(start, start + at_once))
            parts.append(_of_texts(model, some, seen))
            for outputs in seen.values():
                outputs.clear()
        turns.stop()
        turns.tell(**{name: sum(p[name] for p in parts) / len(parts) for name in parts[0]})


def _keep(into: list[Tensor], _module: Any, _args: Any, output: Any) -> None:
    into.append(output[0] if isinstance(output, tuple) else output)


def _of_texts(model: Any, batch: TokenBatch, seen: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Means over layers and tokens, by the names that `Readings.of_layers` gives them."""
    last: list[Tensor] = []  # HF's last hidden state is normed
    handle = model.model.layers[-1].register_forward_hook(partial(_keep, last))
    hidden = model.model(batch.input_ids, output_hidden_states=True).hidden_states
    handle.remove()
    before = batch.response_mask.roll(-1, dims=1)
    before[:, -1] = False

    def read(x: Tensor) -> Tensor:
        return model.lm_head(x[before]).log_softmax(-1)

    full, change = read(hidden[-1]), entropy(read(hidden[0]))
    sums: dict[str, float] = {}
    streams = [*hidden[1:-1], last[0]]
    for i, stream in enumerate(streams):
        log_p = read(stream)
        h = {name: entropy(read(outputs[i])) for name, outputs in seen.items()}
        middle = hidden[i] + seen["attention"][i]
        found = {
            **beside("", log_p, full),
            **{f"{name}_entropy_nats": value for name, value in h.items()},
            "layer_entropy_change_nats": entropy(log_p) - change,
            "attention_entropy_change_nats": h["attention"] - h["attention_input"],
            "ffn_entropy_change_nats": h["ffn"] - h["ffn_input"],
            "attention_cosine": torch.cosine_similarity(
                seen["attention"][i][before], hidden[i][before], dim=-1
            ),
            "ffn_cosine": torch.cosine_similarity(seen["ffn"][i][before], middle[before], dim=-1),
        }
        change = entropy(log_p)
        found |= beside("normed_", read(model.model.norm(stream)), full)
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.mean()) / len(streams)
    return sums


def entropy(log_p: Tensor) -> Tensor:
    """`[tokens, vocab]` -> `[tokens]`, nats."""
    return -(log_p.exp() * log_p).sum(-1)


def beside(prefix: str, log_p: Tensor, full: Tensor) -> dict[str, Tensor]:
    """A policy and how far it is from the full one."""
    return {
        f"{prefix}entropy_nats": entropy(log_p),
        f"{prefix}kl_to_full_nats": (log_p.exp() * (log_p - full)).sum(-1),
        f"{prefix}kl_from_full_nats": (full.exp() * (full - log_p)).sum(-1),
        f"{prefix}top1_agreement": (log_p.argmax(-1) == full.argmax(-1)).float(),
    }


def as_table(rows: Sequence[dict[str, Any]], versions: Mapping[str, str]) -> Table:
    """Seconds and MB, and behind each its ratio to ours."""
    title = ", ".join(f"{name} {number}" for name, number in versions.items())
    table = Table(title=title, caption="behind each number: its ratio to ours")
    for heading in ("", "s", "CPU s", "extra MB"):
        table.add_column(heading, justify="right" if heading else "left")
    own = next(row for row in rows if row["who"] == OURS)
    for row in rows:
        numbers = (f"{row['s']:.1f}", f"{row['cpu_s']:.1f}", f"{row['extra_bytes'] / 1e6:.0f}")
        ratios = (f"{row[name] / own[name]:.2f}" for name in MEASURED)
        table.add_row(row["who"], *map(" ".join, zip(numbers, ratios, strict=True)))
    return table


if __name__ == "__main__":
    main()
