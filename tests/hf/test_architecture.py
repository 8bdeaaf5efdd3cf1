from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.experts import Experts

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}

QWEN3_4B = {  # as transformers 4 wrote it
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_4B | {  # likewise
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_3B = {  # likewise
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def write(folder: Path, config: Any, generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_qwen3_4b_as_transformers_4_wrote_it(tmp_path: Path):
    eos = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    assert read_architecture(write(tmp_path, QWEN3_4B, eos)) == Architecture(
        family="qwen3",
        layers=36,
        hidden_size=2560,
        ffn_size=9728,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        tied=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=True,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=40960,
        eos_token_ids=(151645, 151643),
        pad_token_id=None,
        dtype="bfloat16",
    )


def test_llama_3_2_keeps_its_rope_scaling_and_its_three_ends(tmp_path: Path):
    arch = read_architecture(write(tmp_path, LLAMA_3_2_3B))
    assert arch.rope_scaling == LLAMA3_ROPE
    assert arch.rope_theta == 5e5
    assert arch.eos_token_ids == (128001, 128008, 128009)
    assert not arch.qkv_bias


def test_qwen3_30b_a3b_has_experts_in_every_layer(tmp_path: Path):
    arch = read_architecture(write(tmp_path, QWEN3_30B_A3B))
    assert arch.experts == Experts(
        layers=tuple(range(1, 49)), number=128, per_token=8, ffn_size=768, normalized=True
    )
    assert arch.qk_norm


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_hidden_layers": 2},  # 128 experts: seconds to build
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
        {"num_local_experts": 9, "norm_topk_prob": True},  # as transformers 5 writes it
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2, 4]},
        {"mlp_only_layers": [0, 3]},
        {"mlp_only_layers": list(range(7))},
    ],
    ids=str,
)
def test_experts_are_where_transformers_puts_them(tmp_path: Path, knobs: dict[str, Any]):
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = read_architecture(
        write(tmp_path, {"model_type": "qwen3_moe", "num_hidden_layers": 7, **knobs})
    )
    config: Any = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    theirs = {n for n, layer in enumerate(model.model.layers, 1) if hasattr(layer.mlp, "experts")}
    if not theirs:
        assert arch.experts is None
        return
    assert arch.experts is not None
    assert set(arch.experts.layers) == theirs
    block = model.model.layers[min(theirs) - 1].mlp
    assert arch.experts.number == block.gate.num_experts == block.experts.num_experts
    assert arch.experts.per_token == block.gate.top_k
    assert arch.experts.normalized == block.gate.norm_topk_prob
    assert arch.experts.ffn_size == block.experts.down_proj.shape[-1]


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sizes": {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1e-5,
    },
    "no grouping": {"num_attention_heads": 4, "num_key_value_heads": None, "hidden_size": 64},
    "head_dim": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 24,
    },
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 12345.0},
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": {**LLAMA3_ROPE}},
    "llama3, implied context": {
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}
    },
    "new rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 4e5}},
    "new llama3": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}},
    "ids": {"eos_token_id": [5, 6], "pad_token_id": 7},
    "old dtype": {"torch_dtype": "bfloat16"},
    "new dtype": {"dtype": "float16"},
    "unused window": {"use_sliding_window": False, "sliding_window": 128},
    "window above the last layer": {
        "use_sliding_window": True,
        "sliding_window": 128,
        "max_window_layers": 32,
    },
}


# Qwen3-MoE's key-value heads may not be null, and a window is in all its layers or in none.
NOT = {"qwen3_moe": ("no grouping", "window above the last layer")}


@pytest.mark.parametrize(
    ("family", "variant"),
    [(f, v) for f in CLASSES for v in VARIANTS if v not in NOT.get(f, ())],
)
def test_a_config_means_what_transformers_reads_in_it(tmp_path: Path, family: str, variant: str):
    from transformers import AutoConfig

    raw = {"model_type": family, "architectures": [CLASSES[family]], **VARIANTS[variant]}
    arch = read_architecture(write(tmp_path, raw))
    theirs: Any = AutoConfig.from_pretrained(tmp_path)

    assert arch.family == theirs.model_type
    assert arch.layers == theirs.num_hidden_layers
    assert arch.hidden_size == theirs.hidden_size
    assert arch.ffn_size == theirs.intermediate_size
    assert arch.heads == theirs.num_attention_heads
    assert arch.kv_heads == theirs.num_key_value_heads
    assert arch.head_dim == getattr(theirs, "head_dim", arch.hidden_size // arch.heads)
    assert arch.vocab_size == theirs.vocab_size
    assert arch.tied == theirs.tie_word_embeddings
    assert arch.norm_eps == theirs.rms_norm_eps
    assert arch.max_positions == theirs.max_position_embeddings
    assert arch.pad_token_id == theirs.pad_token_id
    eos = theirs.eos_token_id
    assert list(arch.eos_token_ids) == (eos if isinstance(eos, list) else [eos] * (eos is not None))
    assert arch.dtype == str(theirs.dtype or "float32").removeprefix("torch.")

    rope = {k: v for k, v in theirs.rope_parameters.items() if k != "type"}
    assert arch.rope_theta == rope.pop("rope_theta")
    assert arch.rope_scaling == (rope if rope["rope_type"] != "default" else None)


@pytest.mark.parametrize("family", CLASSES)
def test_a_checkpoint_without_architectures_goes_by_its_model_type(tmp_path: Path, family: str):
    assert read_architecture(write(tmp_path, {"model_type": family})).family == family


def test_an_end_of_sequence_in_generation_config_goes_first(tmp_path: Path):
    folder = write(tmp_path, QWEN3_4B, {"eos_token_id": 3})
    assert read_architecture(folder).eos_token_ids == (3,)
    write(tmp_path, QWEN3_4B, {"temperature": 0.6})  # which transformers takes at its word
    assert read_architecture(folder).eos_token_ids == ()
    (folder / "generation_config.json").unlink()
    assert read_architecture(folder).eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            QWEN3_4B,
            {"architectures": ["MixtralForCausalLM"]},
            (
                "architectures=['MixtralForCausalLM']: this architecture cannot be loaded; use one "
                "of Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, LlamaForCausalLM, or "
                "install megatron-bridge, which opens others"
            ),
        ),
        (
            QWEN3_4B,
            {"architectures": None, "model_type": "gpt2"},
            "model_type=gpt2: this architecture cannot be loaded; use one of ",
        ),
        (
            QWEN3_4B,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            (
                "rope_type=yarn: this RoPE scaling is not computed; use a checkpoint with linear, "
                "llama3 or no scaling; "
            ),
        ),
        (QWEN3_4B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic: "),
        (QWEN3_4B, {"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope: "),
        (
            QWEN3_4B,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_type=one per layer type: ",
        ),
        (
            LLAMA_3_2_3B,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor=None: is not a positive number; restore config.json",
        ),
        (QWEN3_4B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: rotating part "),
        (
            QWEN3_4B,
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
            "sliding_window=4096: sliding-window attention is not computed; ",
        ),
        (
            QWEN3_4B,
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
            "sliding_window=16: sliding-window attention is not computed; ",
        ),
        (QWEN3_4B, {"hidden_act": "gelu"}, "hidden_act=gelu: only the SiLU-gated MLP is computed"),
        (
            QWEN3_4B,
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: quantized weights cannot be trained; ",
        ),
        (QWEN3_4B, {"num_hidden_layers": 0}, "num_hidden_layers=0: is not a positive integer"),
        (QWEN3_4B, {"hidden_size": "x"}, "hidden_size=x: is not a positive integer"),
        (QWEN3_4B, {"rms_norm_eps": None}, "rms_norm_eps=None: is not a positive number"),
        (QWEN3_4B, {"tie_word_embeddings": "no"}, "tie_word_embeddings=no: is not true or false"),
        (
            QWEN3_4B,
            {"num_key_value_heads": 5},
            "num_key_value_heads=5: does not divide num_attention_heads=32; ",
        ),
        (
            QWEN3_4B,
            {"attention_bias": True},
            "attention_bias=True, mlp_bias=False: Megatron-Core gives a bias to both the ",
        ),
        (LLAMA_3_2_3B, {"mlp_bias": True}, "attention_bias=False, mlp_bias=True: Megatron-Core "),
        (
            QWEN3_30B_A3B,  # a window whatever max_window_layers says
            {"use_sliding_window": True, "sliding_window": 4096},
            "sliding_window=4096: sliding-window attention is not computed; ",
        ),
        (
            QWEN3_30B_A3B,
            {"num_experts_per_tok": 129},
            "num_experts_per_tok=129: is more than the 128 experts; ",
        ),
        (
            QWEN3_30B_A3B,
            {"num_experts_per_tok": 1},
            "num_experts_per_tok=1, norm_topk_prob=true: a single score scaled to sum to 1 is ",
        ),
        (QWEN3_30B_A3B, {"num_experts": 0}, "num_experts=0: is not a positive integer"),
        (QWEN3_30B_A3B, {"mlp_only_layers": 3}, "mlp_only_layers=3: is not a list"),
        (QWEN3_30B_A3B, {"norm_topk_prob": None}, "norm_topk_prob=None: is not true or false"),
        (
            QWEN3_30B_A3B,
            {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
            "architectures=['Qwen2MoeForCausalLM']: this architecture cannot be loaded; ",
        ),
    ],
)
def test_what_we_would_compute_wrongly_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
):
    folder = write(tmp_path, base | changes)
    with pytest.raises(InputError) as error:
        read_architecture(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: {message}")


def test_a_llama_with_all_biases_is_read(tmp_path: Path):
    arch = read_architecture(
        write(tmp_path, LLAMA_3_2_3B | {"attention_bias": True, "mlp_bias": True})
    )
    assert (arch.qkv_bias, arch.output_bias, arch.mlp_bias) == (True, True, True)


def test_a_qwen2_has_biases_on_query_key_and_value_only(tmp_path: Path):
    arch = read_architecture(write(tmp_path, {"model_type": "qwen2", "attention_bias": True}))
    assert (arch.qkv_bias, arch.output_bias, arch.mlp_bias) == (True, False, False)


def test_a_hub_id_is_not_fetched_but_the_way_to_it_is_told():
    with pytest.raises(InputError) as error:
        read_architecture("Qwen/Qwen3-4B")
    assert str(error.value) == (
        "Qwen/Qwen3-4B: no such directory; a hub id is not fetched here: download it with "
        "`hf download Qwen/Qwen3-4B --local-dir DIR` and give DIR"
    )


def test_a_directory_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"/none: no such directory; give the directory of an HF"):
        read_architecture(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"/file: is a file; give the directory of an HF"):
        read_architecture(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_a_broken_config_json_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_architecture(write(tmp_path, text))


def test_a_missing_config_json_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.json: no such file; "):
        read_architecture(tmp_path)


def test_a_leading_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "model", QWEN3_4B)
    assert read_architecture("~/model").layers == 36
