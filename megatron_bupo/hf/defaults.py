"""What a key absent from config.json means, in transformers' Qwen2Config, Qwen3Config,
Qwen3MoeConfig and LlamaConfig, by family.
"""

from __future__ import annotations

from typing import Any

_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA = {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
_QWEN_MOE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
    "qwen3_moe": {**_COMMON, **_QWEN, **_QWEN_MOE},
    "llama": {**_COMMON, **_LLAMA},
}
