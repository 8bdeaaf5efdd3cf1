"""Which tensors should the checkpoint hold, and which does it? Answered from safetensors headers,
without torch.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype,
shape, data_offsets}}` and the data. Reading the headers costs milliseconds whatever the size of
the model, so a config.json that belongs to other weights, or a download that broke off, is found
before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, existing_directory, read_json_object

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
FUSED_EXPERTS = "mlp.experts.gate_up_proj"
TRAINABLE_DTYPES = {"F64", "F32", "F16", "BF16"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: its file, dtype (as safetensors names it, e.g. BF16) and shape."""

    file: Path
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint directory by HF name."""

    model_dir: Path
    tensors: Mapping[str, StoredTensor]


def expected_tensors(arch: Architecture) -> dict[str, Shape]:
    """HF name -> shape of every tensor of `arch`, in model order; tied: no `lm_head.weight`."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size)}
    for layer in range(arch.layers):
        for name, shape in _layer_tensors(arch, layer + 1).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    return shapes


def _layer_tensors(arch: Architecture, layer: int) -> dict[str, Shape]:
    hidden = arch.hidden_size
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    linear = {  # name: (out, in, has a bias)
        "self_attn.q_proj": (queries, hidden, arch.qkv_bias),
        "self_attn.k_proj": (keys, hidden, arch.qkv_bias),
        "self_attn.v_proj": (keys, hidden, arch.qkv_bias),
        "self_attn.o_proj": (hidden, queries, arch.output_bias),
        **_mlp_tensors(arch, layer),
    }
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (arch.head_dim,)
    for name, (rows, columns, has_bias) in linear.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _mlp_tensors(arch: Architecture, layer: int) -> dict[str, tuple[int, int, bool]]:
    """The MLP of `layer` (from 1), or its router and all its experts."""
    experts, hidden = arch.experts, arch.hidden_size
    sizes = {"mlp": arch.ffn_size}
    router = {}
    if experts and layer in experts.layers:
        sizes = {f"mlp.experts.{e}": experts.ffn_size for e in range(experts.number)}
        router = {"mlp.gate": (experts.number, hidden, False)}
    mlps = {
        f"{mlp}.{name}": (*((hidden, ffn) if name == "down_proj" else (ffn, hidden)), arch.mlp_bias)
        for mlp, ffn in sizes.items()
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return router | mlps


def read_index(model_dir: str | Path) -> CheckpointIndex:
    """What the safetensors files of `model_dir` hold, one file or shards."""
    folder = existing_directory(model_dir)
    if (folder / SINGLE_FILE).exists():
        return CheckpointIndex(folder, _stored_tensors(folder / SINGLE_FILE))
    index = folder / SHARD_INDEX
    if not index.exists():
        raise _without_safetensors(folder)
    weight_map = read_json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())):
        raise InputError(str(index), "has no weight_map", "download the checkpoint again")
    shards = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            reason = f"no such file, but {SHARD_INDEX} names it"
            raise InputError(str(folder / file), reason, "download the checkpoint again")
        shards[file] = _stored_tensors(folder / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            reason = f"does not hold {name}, but {SHARD_INDEX} says so"
            raise InputError(str(folder / file), reason, "download the checkpoint again")
    return CheckpointIndex(folder, {name: shards[file][name] for name, file in weight_map.items()})


def _without_safetensors(folder: Path) -> InputError:
    if any(folder.glob("pytorch_model*.bin")):
        return InputError(
            str(folder),
            "holds pytorch_model.bin but no safetensors, which alone are read",
            "convert: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW)",
        )
    reason = f"holds neither {SINGLE_FILE} nor {SHARD_INDEX}"
    return InputError(str(folder), reason, "give the directory of a complete HF checkpoint")


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors that the header of the safetensors file `path` lists, all data present."""
    header, data_bytes = _header(path)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]))
            missing = entry["data_offsets"][1] - data_bytes
        except (LookupError, TypeError):
            reason = f"is not a safetensors file: its header describes {name} as {entry}"
            raise InputError(str(path), reason, "download it again") from None
        if missing > 0:
            reason = f"is truncated: the last {missing} bytes of {name} are missing"
            raise InputError(str(path), reason, "download it again")
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the number of bytes of data behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            reason = f"is truncated or not a safetensors file: {size} bytes do not hold its header"
            raise InputError(str(path), reason, "download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        reason = "is not a safetensors file: its header is not a JSON object"
        raise InputError(str(path), reason, "download it again")
    return header, size - 8 - length


def check_tensors(arch: Architecture, index: CheckpointIndex) -> None:
    """The checkpoint holds the tensors that config.json describes, in its shapes, and no others."""
    expected, found = expected_tensors(arch), index.tensors
    folder = index.model_dir
    if missing := [name for name in expected if name not in found]:
        way_out = "complete the checkpoint, or use the config.json that was saved with it"
        if any(name.endswith(FUSED_EXPERTS) for name in found):
            way_out = (
                "its experts are stacked in one tensor: save it again by transformers' "
                "save_pretrained, which by default writes a tensor for each"
            )
        if missing == ["lm_head.weight"]:
            way_out = "if the model is tied, set tie_word_embeddings to true in config.json"
        raise InputError(
            f"{folder}: {_listed(missing)}", "config.json asks for it, no file holds it", way_out
        )
    if unexpected := [name for name in found if name not in expected and not _harmless(name, arch)]:
        raise InputError(
            f"{found[unexpected[0]].file}: {_listed(unexpected)}",
            f"no place for it in the {arch.layers}-layer {arch.family} model of config.json",
            "use the config.json that was saved with these weights",
        )
    for name, shape in expected.items():
        stored = found[name]
        if stored.shape != shape:
            raise InputError(
                f"{stored.file}: {name}",
                f"has shape {list(stored.shape)} on disk, but config.json gives {list(shape)}",
                "use the config.json that was saved with these weights",
            )
        if stored.dtype not in TRAINABLE_DTYPES:
            raise InputError(
                f"{stored.file}: {name}",
                f"has dtype {stored.dtype}, which cannot be trained",
                "use the float32 or bfloat16 checkpoint of this model",
            )


def _harmless(name: str, arch: Architecture) -> bool:
    """Old checkpoints store RoPE's frequencies; some store a tied unembedding a second time."""
    return name.endswith("rotary_emb.inv_freq") or (arch.tied and name == "lm_head.weight")


def _listed(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} (and {len(rest)} more)" if rest else first
