"""Qwen2, Qwen3 and Llama in plain torch, straight from the safetensors: tensors by name in a dict.

Keys and values are kept per request as `[tokens, layers, 2, kv_heads, head_dim]`, with the rotation
already in the keys, so that new weights leave old keys stale, as in the real server.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, pad, silu
from torch.nn.utils.rnn import pad_sequence

FAMILIES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VOCAB_MULTIPLE = 64  # rows of embedding and unembedding; zeros fill up
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `directory`, as the loader of the real one finds
    them.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"Cannot find any model weights with `{directory}`")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class Model:
    """A checkpoint that answers with logits."""

    def __init__(self, directory: Path, *, dtype: str, override: str) -> None:
        config = json.loads((directory / "config.json").read_text()) | json.loads(override)
        self.config: dict[str, Any] = config
        self.family: str = config["architectures"][0]
        rope = config.get("rope_parameters") or {}
        self.theta = float(rope.get("rope_theta") or config["rope_theta"])
        unknown = rope.get("rope_type", "default") != "default" or config.get("rope_scaling")
        if self.family not in FAMILIES or unknown or config.get("use_sliding_window"):
            raise SystemExit(f"the fake knows {FAMILIES} with plain rope, not {config}")
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.vocab: int = config["vocab_size"]
        self.tied = bool(config.get("tie_word_embeddings"))
        self.dtype = DTYPES[config["dtype"] if dtype == "auto" else dtype]
        tensors = read_weights(directory)
        if self.tied:
            tensors.pop("lm_head.weight", None)
        kept = {n: t.to(self.dtype) for n, t in tensors.items() if self._layer(n) < self.layers}
        self.weights: dict[str, Tensor] = kept

    @staticmethod
    def _layer(name: str) -> int:
        parts = name.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else -1

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over tensors in place by the real loader's rules: what is not a name of a parameter
        is passed over with a warning, or raises where it looks like a part of a fused one.
        """
        for name, tensor in tensors:
            if name.split(".")[0] in ("layers", "embed_tokens", "norm"):
                name = f"model.{name}"  # noqa: PLW2901
            if self._layer(name) >= self.layers:
                continue
            mine = self.weights.get(name)
            if mine is None:
                parts = [part for fused in FUSED.values() for part in fused]
                if any(part in name for part in parts) and not name.endswith(".bias"):
                    raise KeyError(name)
                print(f"Parameter {name} not found in params_dict", flush=True)
                continue
            if mine.shape != tensor.shape:
                raise AssertionError(
                    f"Attempted to load weight ({tensor.shape}) into parameter ({mine.shape})"
                )
            mine.copy_(tensor)

    def checksums(self) -> dict[str, str]:
        """By the names of the real one's parameters: sha256 of the bytes, the first eight, hex."""
        fused: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.weights.items():
            whole, part = name, name
            for fusion, parts in FUSED.items():
                for i in range(len(parts)):
                    if f".{parts[i]}." in name:
                        whole, part = name.replace(parts[i], fusion), str(i)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor = pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))  # noqa: PLW2901
            fused.setdefault(whole, {})[part] = tensor
        return {
            name: _short_hash(torch.cat([parts[part] for part in sorted(parts)]))
            for name, parts in sorted(fused.items())
        }

    def empty_cache(self) -> Tensor:
        """Keys and values of no tokens."""
        return torch.empty(0, self.layers, 2, self.kv_heads, self.head_dim, dtype=self.dtype)

    @torch.inference_mode()
    def forward(self, ids: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits `[rows, tokens, vocab]` fp32 of new tokens `ids [rows, tokens]` behind those in
        `caches`, and the caches with them.
        """
        w, eps = self.weights, self.config["rms_norm_eps"]
        rows, width = ids.shape
        lengths = torch.tensor([len(cache) for cache in caches])
        past = pad_sequence(caches, batch_first=True)
        positions = lengths[:, None] + torch.arange(width)
        old = torch.arange(past.shape[1])[None, None] < lengths[:, None, None]
        new = torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.cat([old.expand(-1, width, -1), new.expand(rows, -1, -1)], dim=-1)
        x = w["model.embed_tokens.weight"][ids]
        news = []
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
            q, k, v = (self._heads(h, f"{p}self_attn.{name}", positions) for name in "qkv")
            news.append(torch.stack([k, v], dim=2))
            keys = torch.cat([past[:, :, layer, 0], k], dim=1)
            values = torch.cat([past[:, :, layer, 1], v], dim=1)
            x = x + self._dense(attend(q, keys, values, mask), f"{p}self_attn.o_proj")
            h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
            gate, up = (self._dense(h, f"{p}mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._dense(silu(gate) * up, f"{p}mlp.down_proj")
        x = rms_norm(x, w["model.norm.weight"], eps)
        head = w["model.embed_tokens.weight" if self.tied else "lm_head.weight"]
        added = torch.stack(news, dim=2)  # [rows, tokens, layers, 2, kv_heads, head_dim]
        grown = [torch.cat(pair) for pair in zip(caches, added, strict=True)]
        return linear(x, head).float(), grown

    def _dense(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _heads(self, x: Tensor, name: str, positions: Tensor) -> Tensor:
        """Query, key or value `[rows, tokens, heads, head_dim]`, normed and rotated where due."""
        out = self._dense(x, f"{name}_proj").unflatten(-1, (-1, self.head_dim))
        norm = self.weights.get(f"{name}_norm.weight")  # Qwen3's
        if norm is not None:
            out = rms_norm(out, norm, self.config["rms_norm_eps"])
        return out if name.endswith("v") else rotate(out, positions, self.theta)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `x [rows, tokens, heads, head_dim]`, halves paired."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half) / half)
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention; heads of `q` share those of `k` and `v` in groups."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v).flatten(2)


def _short_hash(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).digest()[:8].hex()
