"""A hundred ways in which an HF checkpoint directory goes wrong, and what must be said of each.

A mutation changes a directory; with it stands a word of the error that it must lead to (a key, a
file, a tensor), or `SAME` where the checkpoint is still the one that it was.
"""

# ruff: noqa: ARG005 - a mutation takes what it may not need
from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAME = ""
Mutation = Callable[[Path], None]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, TOKENIZER = "model.safetensors.index.json", "tokenizer.json"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
GONE = object()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """`path` with what it says changed; `change` alters it or returns another."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def config(**values: Any) -> Mutation:
    """config.json with these keys set."""

    def mutate(folder: Path) -> None:
        def change(found: dict[str, Any]) -> None:
            found.update(values)
            for key in [key for key, value in values.items() if value is GONE]:
                del found[key]

        edit(folder / CONFIG, change)

    return mutate


def alone(mutation: Mutation) -> Mutation:
    """The same, without a generation_config.json, which would decide."""

    def mutate(folder: Path) -> None:
        (folder / "generation_config.json").unlink()
        mutation(folder)

    return mutate


def rope(**values: Any) -> Mutation:
    """config.json with a RoPE of the first generation's keys."""
    return config(rope_scaling=values, rope_parameters=GONE, rope_theta=10000.0)


def text(name: str, content: str | bytes) -> Mutation:
    """The file `name` with another content."""
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        and None
    )


def encoded(name: str, encoding: str) -> Mutation:
    """The file `name` as the same text in another encoding."""

    def mutate(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_text().encode(encoding))

    return mutate


def truncated(name: str, keep: Callable[[int], int]) -> Mutation:
    """The first `keep(size)` bytes of the file `name`."""

    def mutate(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: keep(len(content))])

    return mutate


def removed(name: str) -> Mutation:
    """Without the file `name`."""
    return lambda folder: (folder / name).unlink()


def directory(name: str) -> Mutation:
    """A directory in the place of the file `name`."""

    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return mutate


def dangling(name: str) -> Mutation:
    """A link to nowhere in the place of the file `name`."""

    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / "nowhere")

    return mutate


def tensors(change: Callable[[dict[str, Any]], Any]) -> Mutation:
    """The same file with other tensors."""

    def mutate(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(
            {n: t.clone().contiguous() for n, t in held.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )

    return mutate


def renamed(old: str, new: str) -> Mutation:
    """The tensor `old` under another name."""
    return tensors(lambda held: held.update({new: held.pop(old)}))


def cast(name: str, dtype: str) -> Mutation:
    """The tensor `name` in another dtype."""

    def change(held: dict[str, Any]) -> None:
        import torch

        held[name] = held[name].to(getattr(torch, dtype))

    return tensors(change)


def header(change: Callable[[dict[str, Any]], Any]) -> Mutation:
    """The header of the weights changed, the data as it is."""

    def mutate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + length])
        changed = change(found)
        raw = json.dumps(found if changed is None else changed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return mutate


def entry(name: str, **values: Any) -> Mutation:
    """What the header says of the tensor `name`, changed."""
    return header(lambda found: found[name].update(values))


def raw_header(raw: bytes, length: int | None = None) -> Mutation:
    """A file that begins with `raw` as its header, and says that it is `length` long."""
    size = struct.pack("<Q", len(raw) if length is None else length)
    return text(WEIGHTS, size + raw + bytes(64))


def sharded(change: Callable[[Path, dict[str, Any]], Any]) -> Mutation:
    """Two shards with an index, which `change(folder, index)` then damages."""

    def mutate(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = list(held)
        weight_map = {}
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({n: held[n] for n in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        changed = change(folder, index)
        (folder / INDEX).write_text(json.dumps(index if changed is None else changed))

    return mutate


def _second(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def _duplicate(folder: Path, index: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    first = folder / "model-00001-of-00002.safetensors"
    name, tensor = next(iter(load_file(first).items()))
    second = load_file(_second(folder))
    save_file({**second, name: tensor * 2}, _second(folder))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut_index(folder: Path) -> None:
    sharded(lambda f, i: None)(folder)
    truncated(INDEX, lambda n: n // 2)(folder)


DEEP = "[" * 100_000
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    # config.json as a file
    "nothing": (lambda folder: None, SAME),
    "config missing": (removed(CONFIG), "config.json"),
    "config empty": (text(CONFIG, ""), "config.json"),
    "config cut off": (truncated(CONFIG, lambda n: n // 2), "config.json"),
    "config with a BOM": (encoded(CONFIG, "utf-8-sig"), "config.json"),
    "config in UTF-16": (encoded(CONFIG, "utf-16"), "config.json"),
    "config in no encoding": (text(CONFIG, b'{"a": "\xff\xfe"}'), "config.json"),
    "config deep": (text(CONFIG, DEEP), "config.json"),
    "config deep inside": (text(CONFIG, '{"a":' * 50_000), "config.json"),
    "config a list": (text(CONFIG, "[]"), "config.json"),
    "config null": (text(CONFIG, "null"), "config.json"),
    "config two objects": (text(CONFIG, "{}{}"), "config.json"),
    "config without a key": (text(CONFIG, "{}"), "model_type"),
    "config a directory": (directory(CONFIG), "config.json"),
    "config a link to nowhere": (dangling(CONFIG), "config.json"),
    "config with a number of 5000 digits": (
        lambda f: edit(f / CONFIG, lambda c: None)
        or (f / CONFIG).write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        "config.json",
    ),
    # its keys
    "family unknown": (
        config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "GPT2LMHeadModel",
    ),
    "family a number": (config(architectures=5), "architectures"),
    "family a text": (config(architectures="Qwen3ForCausalLM"), "architectures"),
    "family of objects": (config(architectures=[{}]), "architectures"),
    "family by model_type alone": (config(architectures=GONE), SAME),
    "families that disagree": (config(model_type="llama"), "model_type"),
    "model_type a list": (config(model_type=["qwen3"]), "model_type"),
    "another family": (
        config(architectures=["LlamaForCausalLM"], model_type="llama"),
        "_norm",
    ),
    "a layer less": (config(num_hidden_layers=1), "model.layers.1"),
    "a layer more": (config(num_hidden_layers=3), "model.layers.2"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "layers negative": (config(num_hidden_layers=-2), "num_hidden_layers"),
    "layers a billion": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "layers a text": (config(num_hidden_layers="2"), "num_hidden_layers"),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers"),
    "layers 2.0": (config(num_hidden_layers=2.0), "num_hidden_layers"),
    "layers null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "layers a list": (config(num_hidden_layers=[2]), "num_hidden_layers"),
    "hidden size missing": (config(hidden_size=GONE), "4096"),
    "hidden size 31": (config(hidden_size=31), "31"),
    "hidden size huge": (config(hidden_size=10**30), "hidden_size"),
    "heads doubled": (config(num_attention_heads=8), "q_proj"),
    "heads that groups do not divide": (config(num_attention_heads=5), "num_key_value_heads"),
    "more groups than heads": (config(num_key_value_heads=8), "num_key_value_heads"),
    "groups null": (config(num_key_value_heads=None), "k_proj"),
    "head_dim negative": (config(head_dim=-8), "head_dim"),
    "head_dim missing": (config(head_dim=GONE), "128"),
    "a vocabulary too small": (config(vocab_size=50), EMBEDDING),
    "a vocabulary too large": (config(vocab_size=128), EMBEDDING),
    "ffn a tenth": (config(intermediate_size=4.8), "intermediate_size"),
    "eps NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "eps infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps"),
    "eps a text": (config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "eps zero": (config(rms_norm_eps=0), "rms_norm_eps"),
    "eps of 400 digits": (config(rms_norm_eps=10**400), "rms_norm_eps"),
    "tied, with another unembedding": (config(tie_word_embeddings=True), "lm_head"),
    "tied a text": (config(tie_word_embeddings="false"), "tie_word_embeddings"),
    "bias without biases": (config(attention_bias=True), "bias"),
    "gelu": (config(hidden_act="gelu"), "hidden_act"),
    "activation a list": (config(hidden_act=["silu"]), "hidden_act"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "positions negative": (config(max_position_embeddings=-1), "max_position_embeddings"),
    "positions huge": (config(max_position_embeddings=10**40), "max_position_embeddings"),
    "sliding window": (config(layer_types=["sliding_attention"] * 2), "sliding_window"),
    "layer types a number": (config(layer_types=5), "layer_types"),
    "layer types of lists": (config(layer_types=[[], []]), "sliding_window"),
    "a window from no number": (
        config(layer_types=GONE, use_sliding_window=True, sliding_window=8, max_window_layers="x"),
        "max_window_layers",
    ),
    "dtype unknown": (config(dtype="banana"), "dtype"),
    "dtype of 8 bits": (config(dtype="float8_e4m3fn"), "dtype"),
    "dtype a list": (config(dtype=["float32"]), "dtype"),
    "end of sequence a text": (alone(config(eos_token_id="2")), "eos_token_id"),
    "end of sequence negative": (alone(config(eos_token_id=-5)), "eos_token_id"),
    "end of sequence outside": (alone(config(eos_token_id=[1, 10**9])), "eos_token_id"),
    "padding outside": (config(pad_token_id=999), "pad_token_id"),
    "a key that nobody knows": (config(colour="blue"), SAME),
    # RoPE
    "theta negative": (config(rope_parameters={"rope_theta": -1.0}), "rope_theta"),
    "theta NaN": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta"),
    "theta a text": (config(rope_parameters={"rope_theta": "1e4"}), "rope_theta"),
    "theta of the first generation": (config(rope_parameters=GONE, rope_theta=10000.0), SAME),
    "RoPE a list": (config(rope_parameters=[1]), "rope"),
    "RoPE yarn": (rope(rope_type="yarn", factor=4.0), "yarn"),
    "RoPE dynamic": (rope(type="dynamic", factor=2.0), "dynamic"),
    "RoPE longrope": (rope(rope_type="longrope", long_factor=[1.0]), "longrope"),
    "RoPE of a type that is a list": (rope(rope_type=["linear"]), "rope_type"),
    "RoPE linear without a factor": (rope(rope_type="linear"), "factor"),
    "RoPE linear by nothing": (rope(rope_type="linear", factor=0), "factor"),
    "RoPE linear by infinity": (rope(rope_type="linear", factor=float("inf")), "factor"),
    "RoPE llama3 without a frequency": (rope(rope_type="llama3", factor=8.0), "low_freq_factor"),
    "RoPE llama3 of one frequency": (
        rope(rope_type="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=2.0),
        "low_freq_factor",
    ),
    "RoPE on half a head": (
        config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "RoPE by layer type": (
        config(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        "rope_type",
    ),
    # generation_config.json
    "generation config cut off": (text("generation_config.json", '{"eos'), "generation_config"),
    "generation config to nowhere": (dangling("generation_config.json"), "generation_config"),
    "generation config of no token": (
        text("generation_config.json", '{"eos_token_id": [1, "x"]}'),
        "eos_token_id",
    ),
    # the weights as a file
    "weights missing": (removed(WEIGHTS), WEIGHTS),
    "weights a directory": (directory(WEIGHTS), WEIGHTS),
    "weights to nowhere": (dangling(WEIGHTS), WEIGHTS),
    **{
        f"weights cut to {name}": (truncated(WEIGHTS, keep), WEIGHTS)
        for name, keep in {
            "nothing": lambda n: 0,
            "1 byte": lambda n: 1,
            "7 bytes": lambda n: 7,
            "8 bytes": lambda n: 8,
            "9 bytes": lambda n: 9,
            "half of the header": lambda n: 700,
            "half": lambda n: n // 2,
            "all but 1 byte": lambda n: n - 1,
            "all but 4 kB": lambda n: n - 4096,
        }.items()
    },
    "weights with bytes behind": (
        lambda f: (f / WEIGHTS).open("ab").write(b"0000") and None,
        WEIGHTS,
    ),
    "weights of text": (text(WEIGHTS, "<html>not found</html>" * 100), WEIGHTS),
    "weights a pointer of git-lfs": (
        text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        WEIGHTS,
    ),
    "header no JSON": (raw_header(b"{tensors}"), WEIGHTS),
    "header deep": (raw_header(DEEP.encode()), WEIGHTS),
    "header a list": (raw_header(b"[]"), WEIGHTS),
    "header of 2^63 bytes": (raw_header(b"{}", 2**63), WEIGHTS),
    "header in UTF-16": (raw_header("{}".encode("utf-16")), WEIGHTS),
    "header with a name twice": (
        raw_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}'),
        WEIGHTS,
    ),
    "header without tensors": (raw_header(b"{}"), WEIGHTS),
    "an entry a number": (header(lambda h: h.update({NORM: 5})), NORM),
    "an entry without a shape": (header(lambda h: h[NORM].pop("shape") and None), NORM),
    "a shape of text": (entry(NORM, shape=["32"]), NORM),
    "a shape negative": (entry(NORM, shape=[-32]), NORM),
    "a shape nested": (entry(NORM, shape=[[32]]), NORM),
    "a shape that its bytes do not have": (entry(NORM, shape=[64]), NORM),
    "a shape transposed in the header": (entry(DOWN, shape=[48, 32]), DOWN),
    "a dtype that nobody knows": (entry(NORM, dtype="F33"), NORM),
    "a dtype swapped for integers": (entry(NORM, dtype="I32"), NORM),
    "a dtype swapped for half": (entry(NORM, dtype="F16"), NORM),
    "offsets outside": (entry(NORM, data_offsets=[10**12, 10**12 + 128]), NORM),
    "offsets negative": (entry(NORM, data_offsets=[-128, 0]), NORM),
    "offsets of text": (entry(NORM, data_offsets=["0", "128"]), NORM),
    "offsets backwards": (entry(NORM, data_offsets=[128, 0]), NORM),
    "offsets of another tensor": (entry(NORM, data_offsets=[0, 128]), WEIGHTS),
    # the tensors
    "a tensor dropped": (tensors(lambda held: held.__delitem__(DOWN)), DOWN),
    "all tensors dropped": (tensors(lambda held: held.clear()), EMBEDDING),
    "a tensor too many": (tensors(lambda held: held.update(extra=held[NORM])), "extra"),
    "a layer too many": (
        tensors(lambda held: held.update({DOWN.replace("1", "7"): held[DOWN]})),
        "layers.7",
    ),
    "RoPE's frequencies stored": (
        tensors(lambda h: h.update({"model.layers.0.self_attn.rotary_emb.inv_freq": h[NORM]})),
        SAME,
    ),
    "a tensor renamed": (renamed(DOWN, DOWN.replace("down", "dwon")), "down_proj"),
    "a wrapper's prefix": (
        tensors(lambda h: [h.update({f"module.{n}": h.pop(n)}) for n in list(h)]),
        EMBEDDING,
    ),
    "a tensor transposed": (tensors(lambda h: h.update({DOWN: h[DOWN].t()})), DOWN),
    "a tensor flattened": (tensors(lambda h: h.update({DOWN: h[DOWN].flatten()})), DOWN),
    "a tensor a number": (tensors(lambda h: h.update({NORM: h[NORM][0]})), NORM),
    "a tensor without numbers": (tensors(lambda h: h.update({NORM: h[NORM][:0]})), NORM),
    "a row of the vocabulary too many": (
        tensors(lambda h: h.update({EMBEDDING: h[EMBEDDING].repeat(2, 1)[:65]})),
        EMBEDDING,
    ),
    "a tensor of integers": (cast(NORM, "int32"), NORM),
    "a tensor of 8 bits": (cast(DOWN, "float8_e4m3fn"), DOWN),
    "one tensor in bfloat16": (cast(DOWN, "bfloat16"), DOWN),
    "a complex tensor": (cast(NORM, "complex64"), NORM),
    # shards
    "shards": (sharded(lambda f, i: None), SAME),
    "a shard missing": (sharded(lambda f, i: _second(f).unlink()), "model-00002"),
    "a shard empty": (sharded(lambda f, i: _empty(_second(f))), "00002"),
    "a shard to nowhere": (
        sharded(lambda f, i: dangling(_second(f).name)(f)),
        "model-00002",
    ),
    "a tensor in two shards": (sharded(_duplicate), "model-00002"),
    "index a list": (sharded(lambda f, i: []), INDEX),
    "index without a map": (sharded(lambda f, i: {"metadata": {}}), INDEX),
    "index with an empty map": (sharded(lambda f, i: {"weight_map": {}}), EMBEDDING),
    "index of numbers": (sharded(lambda f, i: i["weight_map"].update({NORM: 1})), INDEX),
    "index of a tensor that is not there": (
        sharded(lambda f, i: i["weight_map"].update(extra=_second(f).name)),
        "extra",
    ),
    "index without a tensor": (sharded(lambda f, i: i["weight_map"].pop(NORM) and None), NORM),
    "index to another directory": (
        sharded(lambda f, i: i["weight_map"].update({NORM: "../model.safetensors"})),
        INDEX,
    ),
    "index to the wrong shard": (
        sharded(lambda f, i: i["weight_map"].update(dict.fromkeys((NORM, DOWN), _second(f).name))),
        "model-0000",
    ),
    "index cut off": (_cut_index, INDEX),
}  # fmt: skip


def damaged(original: Path, folder: Path, name: str) -> Path:
    """A copy of `original` in `folder`, mutated as `name` says."""
    out = folder / "checkpoint"
    shutil.copytree(original, out)
    MUTATIONS[name][0](out)
    return out
