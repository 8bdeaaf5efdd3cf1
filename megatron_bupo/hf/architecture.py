"""What model does config.json describe? Read for the families we load, else refused by name.

transformers 4 and 5 write the same facts under different names (`rope_theta` and `rope_scaling`
against `rope_parameters`, `torch_dtype` against `dtype`) and leave out what equals their class's
default (`defaults.py`). A feature that would change the numbers and that the actor does not compute
(YaRN, sliding windows, other activations, quantized weights) is an error, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_bupo.errors import InputError
from megatron_bupo.hf.defaults import DEFAULTS
from megatron_bupo.hf.experts import Experts, read_experts
from megatron_bupo.hf.fields import LARGEST, flag, number, size, token_ids
from megatron_bupo.hf.rope import read_rope

FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}

GENERATION_CONFIG = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
REWARD_MODEL = "ForSequenceClassification"  # ends the name of one of them with a value head
MOST_LAYERS = 10_000  # more is a mistake, and would take minutes to find out


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """A decoder-only transformer as far as layouts, lengths and vocabularies ask; whole model."""

    # qwen2 | qwen3 | qwen3_moe | llama; the name in `architectures` where it is another
    family: str
    layers: int
    ffn_size: int  # of the layers without experts
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool  # the unembedding is the embedding
    max_positions: int
    experts: Experts | None = None  # None: one MLP in every layer
    value_head: bool = False  # a critic: reads h_L out to one number, and has no unembedding

    def lowest(self, layers: int) -> Self:
        """The same model with its lowest `layers` alone."""
        experts = self.experts
        if experts is not None:
            left = tuple(layer for layer in experts.layers if layer <= layers)
            experts = replace(experts, layers=left) if left else None
        return replace(self, layers=layers, experts=experts)


@dataclass(frozen=True, kw_only=True)
class Architecture(DecoderSizes):
    """All of a decoder-only transformer with RMSNorm, RoPE and a gated SiLU MLP."""

    hidden_size: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    # None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor",
    # "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, numbers as floats
    rope_scaling: Mapping[str, Any] | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str  # of the weights on disk, e.g. bfloat16


def read_architecture(model_dir: str | Path, *, value_head: bool = False) -> Architecture:
    """The architecture of the HF checkpoint directory `model_dir`; `value_head`: of the critic that
    begins with it, which may be a reward model too.
    """
    folder = existing_directory(model_dir)
    path = folder / "config.json"
    found = read_json_object(path)
    family = _family(path, found, value_head=value_head)
    raw = {**DEFAULTS[family], **found}
    _refuse_what_we_do_not_compute(path, raw)
    heads, hidden_size = size(path, raw, "num_attention_heads"), size(path, raw, "hidden_size")
    raw["num_key_value_heads"] = raw["num_key_value_heads"] or heads
    raw["head_dim"] = raw["head_dim"] or DEFAULTS[family]["head_dim"] or hidden_size // heads
    rope_theta, rope_scaling = read_rope(path, raw)
    attention_bias = family != "qwen2" and flag(path, raw, "attention_bias")
    arch = Architecture(
        family=family,
        layers=size(path, raw, "num_hidden_layers", at_most=MOST_LAYERS),
        hidden_size=hidden_size,
        ffn_size=size(path, raw, "intermediate_size"),
        heads=heads,
        kv_heads=size(path, raw, "num_key_value_heads"),
        head_dim=size(path, raw, "head_dim"),
        vocab_size=size(path, raw, "vocab_size"),
        tied=flag(path, raw, "tie_word_embeddings") and not value_head,
        value_head=value_head,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and flag(path, raw, "mlp_bias"),
        qk_norm=family in {"qwen3", "qwen3_moe"},
        norm_eps=number(path, raw, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=size(path, raw, "max_position_embeddings"),
        eos_token_ids=eos_token_ids(folder, raw, size(path, raw, "vocab_size")),
        pad_token_id=_pad_token_id(path, raw),
        experts=read_experts(path, raw) if family == "qwen3_moe" else None,
        dtype=_dtype(path, raw),
    )
    _check_consistency(path, arch)
    return arch


def existing_directory(model_dir: str | Path) -> Path:
    """`model_dir` with `~` expanded, if it is a directory."""
    folder = Path(model_dir).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(str(model_dir), "is a file", "give the directory of an HF checkpoint")
    way_out = "give the directory of an HF checkpoint"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model_dir)):
        way_out = (
            "a hub id is not fetched here: download it with "
            f"`hf download {model_dir} --local-dir DIR` and give DIR"
        )
    raise InputError(str(model_dir), "no such directory", way_out)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        way_out = "give the directory of a complete HF checkpoint"
        raise InputError(str(path), "no such file", way_out) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), f"cannot be read as JSON ({error})", "restore it") from None
    if not isinstance(found, dict):
        raise InputError(str(path), "is not a JSON object", "restore it")
    return found


def is_known(model_dir: str | Path) -> bool:
    """Is the checkpoint in `model_dir` of one of the `FAMILIES`?"""
    path = existing_directory(model_dir) / "config.json"
    return _known_family(read_json_object(path)) is not None


def _known_family(raw: Mapping[str, Any], *, value_head: bool = False) -> str | None:
    named = raw.get("architectures") or [
        name for name, family in FAMILIES.items() if family == raw.get("model_type")
    ]
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    if value_head:
        names = [n.replace(REWARD_MODEL, "ForCausalLM") for n in names]
    return next((FAMILIES[n] for n in names if n in FAMILIES), None)


def _family(path: Path, raw: Mapping[str, Any], *, value_head: bool = False) -> str:
    if family := _known_family(raw, value_head=value_head):
        if raw.get("model_type", family) != family:  # by which transformers chooses the model
            raise InputError(
                f"{path}: model_type={raw['model_type']}",
                f"is not that of architectures={raw['architectures']}",
                "restore config.json",
            )
        return family
    key = "architectures" if raw.get("architectures") else "model_type"
    raise InputError(
        f"{path}: {key}={raw.get(key)}",
        "this architecture cannot be loaded",
        f"use one of {', '.join(FAMILIES)}, or install megatron-bridge, which opens others",
    )


def _refuse_what_we_do_not_compute(path: Path, raw: Mapping[str, Any]) -> None:
    if raw["hidden_act"] not in ("silu", "swish"):
        raise InputError(
            f"{path}: hidden_act={raw['hidden_act']}",
            "only the SiLU-gated MLP is computed",
            "use a checkpoint whose activation is silu",
        )
    if raw.get("quantization_config"):
        raise InputError(
            f"{path}: quantization_config",
            "quantized weights cannot be trained",
            "use the float32 or bfloat16 checkpoint of this model",
        )
    layer_types = raw.get("layer_types")
    if layer_types is None:
        windowed = bool(raw.get("use_sliding_window") and raw["sliding_window"])
        if windowed and raw.get("model_type") != "qwen3_moe":  # which has no such key
            below = 0 if raw["max_window_layers"] == 0 else size(path, raw, "max_window_layers")
            windowed = below < size(path, raw, "num_hidden_layers")
    elif not isinstance(layer_types, list):
        raise InputError(
            f"{path}: layer_types={layer_types}", "is not a list", "restore config.json"
        )
    else:
        windowed = any(kind != "full_attention" for kind in layer_types)
    if windowed:
        raise InputError(
            f"{path}: sliding_window={raw.get('sliding_window')}",
            "sliding-window attention is not computed",
            "if prompt and response together are shorter than the window, remove layer_types "
            "and set use_sliding_window to false",
        )


def eos_token_ids(
    folder: Path, config: Mapping[str, Any], vocab_size: int = LARGEST
) -> tuple[int, ...]:
    """Where a response ends: generation_config.json decides; `config`, what config.json says,
    stands in where there is none.
    """
    path = folder / GENERATION_CONFIG
    if path.exists() or path.is_symlink():
        return token_ids(path, read_json_object(path), "eos_token_id", vocab_size)
    return token_ids(folder / "config.json", config, "eos_token_id", vocab_size)


def _pad_token_id(path: Path, raw: Mapping[str, Any]) -> int | None:
    if isinstance(raw["pad_token_id"], list):
        raise InputError(f"{path}: pad_token_id", "is a list of tokens", "restore config.json")
    if raw["pad_token_id"] == -1:  # how the first Llamas say that there is none
        return None
    return next(iter(token_ids(path, raw, "pad_token_id", size(path, raw, "vocab_size"))), None)


def _dtype(path: Path, raw: Mapping[str, Any]) -> str:
    key = "dtype" if raw.get("dtype") else "torch_dtype"
    name = str(raw.get(key) or "float32").removeprefix("torch.")
    if name not in DTYPES:
        way_out = f"use a checkpoint in one of {', '.join(DTYPES)}"
        raise InputError(f"{path}: {key}={raw[key]}", "is no dtype that is trained", way_out)
    return name


def _check_consistency(path: Path, arch: Architecture) -> None:
    if arch.heads % arch.kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads={arch.kv_heads}",
            f"does not divide num_attention_heads={arch.heads}",
            "restore the config.json of the checkpoint",
        )
    if arch.output_bias != arch.mlp_bias:
        raise InputError(
            f"{path}: attention_bias={arch.output_bias}, mlp_bias={arch.mlp_bias}",
            "Megatron-Core gives a bias to both the attention's output and the MLP or to neither",
            "use a checkpoint where they agree",
        )
