"""Which tensors should the checkpoint hold, and which does it? Answered from safetensors headers,
without torch.

Reading the headers costs milliseconds whatever the size of the model, so a config.json that belongs
to other weights, or a download that broke off, is found before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import (
    Architecture,
    DecoderSizes,
    existing_directory,
    read_json_object,
)
from megatron_bupo.hf.headers import Shape, StoredTensor, stored_tensors

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
UNEMBEDDING = "lm_head.weight"
VALUE_HEAD = "score.weight"  # a critic's; zero where the checkpoint has none
FUSED_EXPERTS = "mlp.experts.gate_up_proj"
TRAINABLE_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint directory by HF name."""

    model_dir: Path
    tensors: Mapping[str, StoredTensor]


def expected_tensors(arch: Architecture) -> dict[str, Shape]:
    """HF name -> shape of every tensor of `arch`, in model order; tied: no `lm_head.weight`; a
    critic: `score.weight` instead.
    """
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size)}
    for layer in range(arch.layers):
        for name, shape in _layer_tensors(arch, layer + 1).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if arch.value_head:
        shapes[VALUE_HEAD] = (1, arch.hidden_size)
    elif not arch.tied:
        shapes[UNEMBEDDING] = (arch.vocab_size, arch.hidden_size)
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
        return CheckpointIndex(folder, stored_tensors(folder / SINGLE_FILE))
    index = folder / SHARD_INDEX
    if not index.exists():
        raise _without_safetensors(folder)
    weight_map = read_json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())):
        raise InputError(str(index), "has no weight_map", "download the checkpoint again")
    shards = {file: _shard(folder, file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            reason = f"does not hold {name}, but {SHARD_INDEX} says so"
            raise InputError(str(folder / file), reason, "download the checkpoint again")
    for file, name in ((file, name) for file, held in shards.items() for name in held):
        if (named := weight_map.get(name)) != file:
            place = f"says it is in {named}" if named else "does not name it"
            reason = f"holds {name}, but {SHARD_INDEX} {place}"
            raise InputError(str(folder / file), reason, "download the checkpoint again")
    return CheckpointIndex(folder, {name: shards[file][name] for name, file in weight_map.items()})


def _shard(folder: Path, file: str) -> dict[str, StoredTensor]:
    """The tensors of the file that the index of `folder` names."""
    if Path(file).name != file:
        reason = f"names the file {file!r}, which is not in its directory"
        raise InputError(str(folder / SHARD_INDEX), reason, "download the checkpoint again")
    if not (folder / file).is_file():
        reason = f"no such file, but {SHARD_INDEX} names it"
        raise InputError(str(folder / file), reason, "download the checkpoint again")
    return stored_tensors(folder / file)


def _without_safetensors(folder: Path) -> InputError:
    if any(folder.glob("pytorch_model*.bin")):
        return InputError(
            str(folder),
            "holds pytorch_model.bin but no safetensors, which alone are read",
            "convert: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW)",
        )
    reason = f"holds neither {SINGLE_FILE} nor {SHARD_INDEX}"
    return InputError(str(folder), reason, "give the directory of a complete HF checkpoint")


def exported_tensors(arch: DecoderSizes, model_dir: str | Path) -> dict[str, Shape]:
    """HF name -> shape of what is written of `arch`; where our table does not know it, what its
    checkpoint `model_dir` holds.
    """
    if isinstance(arch, Architecture):
        return expected_tensors(arch)
    stored = read_index(model_dir).tensors
    return {name: tensor.shape for name, tensor in stored.items() if not is_harmless(name, arch)}


def check_tied(arch: DecoderSizes, index: CheckpointIndex) -> None:
    """An unembedding that a tied model stores a second time is the embedding, byte for byte."""
    embedding, copy = (
        index.tensors.get(name) for name in ("model.embed_tokens.weight", UNEMBEDDING)
    )
    if not arch.tied or embedding is None or copy is None:
        return
    same = (embedding.dtype, embedding.shape) == (copy.dtype, copy.shape)
    if not (same and all(a == b for a, b in zip(_blocks(embedding), _blocks(copy), strict=True))):
        raise InputError(
            f"{copy.file}: {UNEMBEDDING}",
            "is not the embedding, but config.json says tie_word_embeddings=true",
            "set tie_word_embeddings to false in config.json if the model was trained so, or "
            "remove the tensor",
        )


def _blocks(tensor: StoredTensor, block_bytes: int = 2**24) -> Iterator[bytes]:
    """The data of `tensor`, piece by piece."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        for first in range(0, tensor.bytes, block_bytes):
            yield file.read(min(block_bytes, tensor.bytes - first))


def check_tensors(arch: Architecture, index: CheckpointIndex) -> None:
    """The checkpoint holds the tensors that config.json describes, in its shapes, and no others."""
    expected, found = expected_tensors(arch), index.tensors
    folder = index.model_dir
    if missing := [name for name in expected if name not in found and name != VALUE_HEAD]:
        way_out = "complete the checkpoint, or use the config.json that was saved with it"
        if any(name.endswith(FUSED_EXPERTS) for name in found):
            way_out = (
                "its experts are stacked in one tensor: save it again by transformers' "
                "save_pretrained, which by default writes a tensor for each"
            )
        if missing == [UNEMBEDDING]:
            way_out = "if the model is tied, set tie_word_embeddings to true in config.json"
        raise InputError(
            f"{folder}: {_listed(missing)}", "config.json asks for it, no file holds it", way_out
        )
    if unexpected := [
        name for name in found if name not in expected and not is_harmless(name, arch)
    ]:
        raise InputError(
            f"{found[unexpected[0]].file}: {_listed(unexpected)}",
            f"no place for it in the {arch.layers}-layer {arch.family} model of config.json",
            "use the config.json that was saved with these weights",
        )
    for name, shape in expected.items():
        stored = found.get(name)
        if stored is None:
            continue
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


def is_harmless(name: str, arch: DecoderSizes) -> bool:
    """Old checkpoints store RoPE's frequencies; some store a tied unembedding a second time; and a
    critic may begin with a language model.
    """
    unread = arch.tied or arch.value_head
    return name.endswith("rotary_emb.inv_freq") or (unread and name == UNEMBEDDING)


def _listed(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} (and {len(rest)} more)" if rest else first
