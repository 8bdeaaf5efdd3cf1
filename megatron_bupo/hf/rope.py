"""Rotary position embeddings as config.json describes them, under the names of two generations of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.hf.fields import number

_NUMBERS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_rope(path: Path, raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE's base and scaling; transformers 5 has both in one mapping, 4 the base beside it."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling={rope}", "is not a mapping", "restore config.json")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    merged = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    merged |= {key: raw[key] for key in merged if raw.get(key) is not None}
    merged |= {"original_max_position_embeddings": raw["max_position_embeddings"], **rope}
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if by_layer or kind not in ("default", *_NUMBERS):
        raise InputError(
            f"{path}: rope_type={'one per layer type' if by_layer else kind}",
            "this RoPE scaling is not computed",
            f"use a checkpoint with {', '.join(_NUMBERS)} or no scaling; a context extension "
            "that was added to config.json by hand can be removed",
        )
    if number(path, merged, "partial_rotary_factor") != 1:
        raise InputError(
            f"{path}: partial_rotary_factor={merged['partial_rotary_factor']}",
            "rotating part of a head is not computed",
            "use a checkpoint that rotates whole heads",
        )
    numbers = {key: number(path, merged, key) for key in _NUMBERS.get(kind, ())}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise InputError(
            f"{path}: low_freq_factor={numbers['low_freq_factor']}",
            f"is not below high_freq_factor={numbers['high_freq_factor']}",
            "restore config.json",
        )
    scaling = {"rope_type": kind, **numbers} if numbers else None
    return number(path, merged, "rope_theta"), scaling
