from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.tensors import CheckpointIndex, check_tensors, expected_tensors, read_index

ARCH = Architecture(
    family="qwen3",
    layers=2,
    hidden_size=8,
    ffn_size=12,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab_size=16,
    tied=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
    eos_token_ids=(),
    pad_token_id=None,
    dtype="float32",
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray]


def zeros(arch: Architecture = ARCH) -> Tensors:
    return {name: np.zeros(shape, np.float32) for name, shape in expected_tensors(arch).items()}


def save(folder: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """Write `tensors` as one file, or dealt out over `shards` with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "bias"),
    [("qwen2", False), ("qwen3", False), ("qwen3_moe", False), ("llama", False), ("llama", True)],
)
def test_expected_tensors_are_those_that_transformers_saves(
    tiny_model_dir: Callable[..., Path], family: str, bias: bool, tied: bool
):
    from safetensors import safe_open

    folder = tiny_model_dir(family=family, bias=bias, tied=tied, layers=3, head_dim=12)
    with safe_open(folder / "model.safetensors", "np") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    arch = read_architecture(folder)
    assert expected_tensors(arch) == saved
    check_tensors(arch, read_index(folder))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_index_tells_where_each_tensor_lies(tmp_path: Path, shards: int):
    tensors = zeros()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    index = read_index(save(tmp_path, tensors, shards=shards))
    assert index.model_dir == tmp_path
    assert set(index.tensors) == set(tensors)
    assert index.tensors[Q_PROJ].shape == (8, 8)
    assert index.tensors["lm_head.weight"].dtype == "F16"
    assert index.tensors[Q_PROJ].dtype == "F32"
    assert len({stored.file for stored in index.tensors.values()}) == shards
    check_tensors(ARCH, index)


def refuse(folder: Path, message: str, arch: Architecture = ARCH) -> None:
    with pytest.raises(InputError) as error:
        check_tensors(arch, read_index(folder))
    assert str(error.value).startswith(message), str(error.value)


def test_a_missing_tensor_is_named(tmp_path: Path):
    tensors = zeros()
    del tensors[Q_PROJ]
    del tensors["model.norm.weight"]
    refuse(
        save(tmp_path, tensors),
        f"{tmp_path}: {Q_PROJ} (and 1 more): config.json asks for it, no file holds it; complete",
    )


def test_a_missing_unembedding_may_mean_a_tied_model(tmp_path: Path):
    tensors = zeros()
    del tensors["lm_head.weight"]
    save(tmp_path, tensors)
    refuse(
        tmp_path,
        f"{tmp_path}: lm_head.weight: config.json asks for it, no file holds it; if the model is "
        "tied, set tie_word_embeddings to true in config.json",
    )
    check_tensors(replace(ARCH, tied=True), read_index(tmp_path))


def test_weights_of_a_deeper_model_are_unexpected(tmp_path: Path):
    save(tmp_path, zeros(replace(ARCH, layers=3)))
    refuse(
        tmp_path,
        f"{tmp_path / 'model.safetensors'}: model.layers.2.input_layernorm.weight (and 10 more): "
        "no place for it in the 2-layer qwen3 model of config.json; use the config.json that was "
        "saved with these weights",
    )


@pytest.mark.parametrize("layout", [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts_have_one_mlp(
    tiny_model_dir: Callable[..., Path], layout: dict[str, Any]
):
    folder = tiny_model_dir(family="qwen3_moe", layers=5, **layout)
    check_tensors(read_architecture(folder), read_index(folder))


def test_experts_stacked_in_one_tensor_are_told_how_to_part(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    source = tiny_model_dir(family="qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path, save_original_format=False)
    refuse(
        tmp_path,
        f"{tmp_path}: model.layers.0.mlp.experts.0.gate_proj.weight (and 47 more): config.json "
        "asks for it, no file holds it; its experts are stacked in one tensor: save it again by ",
        read_architecture(source),
    )


def test_biases_that_config_json_does_not_mention_are_unexpected(tmp_path: Path):
    save(tmp_path, zeros(replace(ARCH, qkv_bias=True)))
    refuse(tmp_path, f"{tmp_path / 'model.safetensors'}: model.layers.0.self_attn.k_proj.bias")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_shape_that_config_json_contradicts_is_named_with_both(tmp_path: Path, shards: int):
    tensors = zeros()
    tensors[Q_PROJ] = np.zeros((4, 8), np.float32)
    save(tmp_path, tensors, shards=shards)
    file = read_index(tmp_path).tensors[Q_PROJ].file
    refuse(
        tmp_path,
        f"{file}: {Q_PROJ}: has shape [4, 8] on disk, but config.json gives [8, 8]; ",
    )


def test_a_config_json_of_another_size_disagrees_with_the_weights(tmp_path: Path):
    save(tmp_path, zeros())
    refuse(
        tmp_path,
        f"{tmp_path / 'model.safetensors'}: model.embed_tokens.weight: has shape [16, 8] on disk, "
        "but config.json gives [20, 8]; ",
        replace(ARCH, vocab_size=20),
    )


def test_quantized_weights_are_refused(tmp_path: Path):
    tensors = zeros()
    tensors[Q_PROJ] = np.zeros((8, 8), np.int8)
    save(tmp_path, tensors)
    refuse(tmp_path, f"{tmp_path / 'model.safetensors'}: {Q_PROJ}: has dtype I8, which cannot be ")


@pytest.mark.parametrize("tied", [False, True])
def test_harmless_extras_are_passed_over(tmp_path: Path, tied: bool):
    extras: Tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    if tied:
        extras["lm_head.weight"] = np.zeros((16, 8), np.float32)
    arch = replace(ARCH, tied=tied)
    check_tensors(arch, read_index(save(tmp_path, zeros(arch) | extras)))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int):
    file = save(tmp_path, zeros()) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    refuse(tmp_path, f"{file}: is truncated")


@pytest.mark.parametrize(
    "header",
    [b"not json", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}', b'"text"', b"[]"],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, header: bytes):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(tmp_path, f"{file}: is not a safetensors file: its header ")


def test_a_missing_shard_is_named(tmp_path: Path):
    save(tmp_path, zeros(), shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    refuse(tmp_path, f"{shard}: no such file, but model.safetensors.index.json names it; download")


def test_a_shard_that_lacks_what_the_index_says_is_named(tmp_path: Path):
    save(tmp_path, zeros(), shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"other": np.zeros(1)}, shard)
    refuse(tmp_path, f"{shard}: does not hold model.embed_tokens.weight, but model.safetensors")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_weight_map_is_named(tmp_path: Path, content: Any):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    refuse(tmp_path, f"{index}: has no weight_map; download")


def test_a_checkpoint_without_safetensors_says_how_to_convert(tmp_path: Path):
    refuse(tmp_path, f"{tmp_path}: holds neither model.safetensors nor model.safetensors.index")
    (tmp_path / "pytorch_model.bin").touch()
    refuse(tmp_path, f"{tmp_path}: holds pytorch_model.bin but no safetensors, which alone are ")


def test_an_index_is_what_a_loader_needs(tmp_path: Path):
    from safetensors import safe_open

    tensors = {name: np.random.default_rng(0).random(t.shape) for name, t in zeros().items()}
    index: CheckpointIndex = read_index(save(tmp_path, tensors, shards=2))
    for name, stored in index.tensors.items():
        with safe_open(stored.file, "np") as file:
            assert np.array_equal(file.get_tensor(name), tensors[name])
