"""Tiny random Hugging Face checkpoints of every family we load, as transformers writes them.

Weights are large and norms and biases random: with transformers' own initialisation logits are
nearly flat, norms are 1 and biases 0, and no test would notice a norm or a bias left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def make_tiny_model(
    path: Path,
    *,
    family: str = "qwen3",
    layers: int = 4,
    hidden: int = 32,
    ffn: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 64,
    tied: bool = False,
    bias: bool = False,
    rope: dict[str, Any] | None = None,
    scale: float = 0.25,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write config.json and model.safetensors (fp32) of a random model to `path`; returns `path`.

    `bias` is llama's `attention_bias` and `mlp_bias` and qwen3's `attention_bias` (qwen2's query,
    key and value always have biases). `rope` updates `rope_parameters`, e.g. `{"rope_theta": 5e5}`
    or `LLAMA3_ROPE`. Further keywords go to the HF config; qwen3_moe's have the defaults `MOE`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if bias and family != "qwen2":
        config["attention_bias"] = True
        if family == "llama":
            config["mlp_bias"] = True
    if family == "qwen3_moe":
        config = {**MOE, "norm_topk_prob": True, **config}
    hf_config = AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | (rope or {}),
        bos_token_id=None,
        eos_token_id=None,
        **config,
    )
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else scale * noise)
    model.save_pretrained(path)
    return path


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
