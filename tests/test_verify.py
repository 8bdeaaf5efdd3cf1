"""`megatron-bupo convert verify`: what is the same is said to be, and every mistake is named."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.cli import main
from tests.damaged_hf import Mutation, config, edit, removed, tensors, text
from tests.mcore.actors import run_config, start_trainer
from tests.ranks import run_ranks
from tests.runs import Done, run, run_python
from tests.test_round_trips import MODELS

pytestmark = pytest.mark.slow

QK = "model.layers.1.self_attn.{}_proj.weight"
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def hf(tiny_model_dir: Callable[..., Path]) -> Path:
    """As many key-value heads as heads, so that queries and keys can be exchanged; log-probs within
    8 nats.
    """
    return tiny_model_dir(family="llama", layers=2, vocab=67, kv_heads=4, scale=0.12)


def convert(hf: Path, out: Path, *layout: str) -> Path:
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(out), *layout]) == 0
    return out


def verify(first: Path, second: Path, *more: str) -> tuple[Done, dict[str, Any]]:
    """How the command ended, and what it wrote."""
    report = second.with_name("report.json")
    done = run("convert", "verify", first, second, "--json", report, *more)
    return done, json.loads(report.read_text()) if report.exists() else {}


def flipped(name: str, bit: int) -> Mutation:
    """One bit of the first number of the tensor `name`."""

    def change(held: dict[str, Tensor]) -> None:
        held[name].view(torch.int32).flatten()[0] ^= 1 << bit

    return tensors(change)


def exchanged(one: str, other: str) -> Mutation:
    return tensors(lambda held: held.update({one: held[other], other: held[one]}))


def groups_exchanged(held: dict[str, Tensor]) -> None:
    """The first two key-value heads, without their queries."""
    for kind in "kv":
        name = QK.format(kind)
        rows = held[name].view(4, 8, -1)
        held[name] = rows[[1, 0, 2, 3]].flatten(0, 1)


def layers_exchanged(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        held[name], held[other] = held[other], held[name]


WRONG_WEIGHTS: dict[str, tuple[Mutation, set[str]]] = {
    "one bit of exponent": (flipped(GATE, 26), {GATE}),
    "queries and keys exchanged": (
        exchanged(QK.format("q"), QK.format("k")),
        {QK.format("q"), QK.format("k")},
    ),
    "two key-value groups exchanged": (
        tensors(groups_exchanged),
        {QK.format("k"), QK.format("v")},
    ),
    "gate and up exchanged": (exchanged(GATE, UP), {GATE, UP}),
    "two layers exchanged": (tensors(layers_exchanged), {GATE, UP, QK.format("q")}),
}


@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [
        ("qwen2 tied", "tp=2 pp=2", "pp=2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3", "pp=2", "tp=2 pp=2"),
                ("qwen3_moe", "ep=2", "tp=2 ep=2"),
                ("llama with llama3 RoPE and biases", "tp=2", "tp=2 pp=2 vpp=2"),
                ("llama tied, as SmolLM2", "", "tp=2 pp=2"),
            )
        ),
    ],
)
def test_megatron_computes_what_transformers_does_whatever_layout_saved_it(
    name: str, saved: str, loaded: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model = tiny_model_dir(vocab=67, scale=0.12, **MODELS[name])
    megatron = convert(model, tmp_path / "megatron", *(f"parallel.{s}" for s in saved.split()))
    done, report = verify(model, megatron, *(f"parallel.{s}" for s in loaded.split()))
    assert done.code == 0, done.err + done.out
    assert report["same"]
    assert report["computed"]["positions"] == 4 * 31
    assert report["computed"]["largest_nats"] < 1e-5
    assert "verdict    same" in done.out


def save_stacked(model_dir: Path, out: Path) -> None:
    """On each rank: all layers of a stage in one tensor, and no files of HF beside."""
    from megatron.core import dist_checkpointing

    from megatron_bupo.mcore.checkpoint import _release_options, _writing_in_this_process

    trainer = start_trainer(model_dir, run_config(parallel={"tp": 2, "pp": 2}))
    state = {"model": trainer.gpt_chunks[0].sharded_state_dict(metadata={})}
    with _writing_in_this_process():
        dist_checkpointing.save(state, str(out), **_release_options())


def test_layers_in_one_tensor_are_read_as_megatron_lm_saves_them(hf: Path, tmp_path: Path):
    (tmp_path / "megatron").mkdir()
    run_ranks(4, save_stacked, hf, tmp_path / "megatron")
    done, report = verify(hf, tmp_path / "megatron", "parallel.pp=2")
    assert done.code == 0, done.err + done.out
    assert report["computed"]["largest_nats"] < 1e-5


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_are_named_and_change_what_is_computed(name: str, hf: Path, tmp_path: Path):
    mutate, changed = WRONG_WEIGHTS[name]
    wrong = Path(shutil.copytree(hf, tmp_path / "wrong"))
    mutate(wrong)
    megatron = convert(wrong, tmp_path / "megatron")
    done, report = verify(hf, megatron)
    assert done.code == 1
    found = {found["name"]: found for found in report["differences"]}
    assert changed <= found.keys()
    assert (
        found["the whole vocabulary"]["largest"] > 1e-3
    )  # by Megatron's own loader, not by our tables
    assert report["differences"][0]["name"] in done.err


def test_a_bit_that_changes_no_logit_is_found(hf: Path, tmp_path: Path):
    wrong = Path(shutil.copytree(hf, tmp_path / "wrong"))
    flipped(GATE, 0)(wrong)
    done, report = verify(hf, wrong)
    assert done.code == 1
    (found,) = report["differences"]
    assert (found["kind"], found["name"]) == ("values", GATE)
    assert 0 < found["largest"] < 1e-7
    assert found["second"] == f"1 of {32 * 48} numbers differ"
    assert report["computed"]["largest_relative"] < 1e-5


WRONG_CONFIGS: dict[str, tuple[Mutation, str]] = {
    "theta": (config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rope_theta"),
    "eps": (config(rms_norm_eps=1e-2), "norm_eps"),
    "dtype": (config(dtype="bfloat16"), "dtype"),
    "tied": (config(tie_word_embeddings=True), "tied"),
    "positions": (config(max_position_embeddings=77), "max_positions"),
    "generation": (text("generation_config.json", '{"eos_token_id": 5}'), "eos_token_ids"),
    "no generation config": (removed("generation_config.json"), "generation_config.json"),
    "a tokenizer more": (text("tokenizer.json", "{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_config_that_differs_is_named(
    name: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mutate, key = WRONG_CONFIGS[name]
    wrong = Path(shutil.copytree(hf, tmp_path / "wrong"))
    mutate(wrong)
    assert main(["convert", "verify", str(hf), str(wrong), "--no-logits"]) == 1
    assert key in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-2), ("rope_theta", 1e6)])
def test_a_wrong_config_changes_what_megatron_computes(
    key: str, value: float, hf: Path, tmp_path: Path
):
    megatron = convert(hf, tmp_path / "megatron")
    new = (
        {"rope_parameters": {"rope_type": "default", key: value}} if "rope" in key else {key: value}
    )
    edit(megatron / "hf" / "config.json", lambda found: found | new)
    done, report = verify(hf, megatron)
    assert done.code == 1
    assert {found["kind"] for found in report["differences"]} == {"config", "logprobs"}


def test_rows_of_padding_that_leak_are_found(hf: Path, tmp_path: Path):
    megatron = convert(hf, tmp_path / "megatron", "parallel.tp=2")  # 68 rows
    edit(megatron / "hf" / "config.json", lambda found: found | {"vocab_size": 68})
    done, report = verify(hf, megatron)
    assert done.code == 1
    shapes = {d["name"]: (d["first"], d["second"]) for d in report["differences"]}
    assert shapes["model.embed_tokens.weight"] == ("[67, 32]", "[68, 32]")
    assert "67 and 68 tokens" in done.out


def test_rows_of_the_vocabulary_that_config_json_cuts_off_are_no_padding(hf: Path, tmp_path: Path):
    megatron = convert(hf, tmp_path / "megatron")
    edit(megatron / "hf" / "config.json", lambda found: found | {"vocab_size": 60})
    done, _ = verify(hf, megatron)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "what follows is not padding" in done.err


def test_a_missing_and_a_misshapen_tensor_are_named(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = Path(shutil.copytree(hf, tmp_path / "wrong"))
    tensors(lambda held: held.update({UP: held[UP].t(), "extra": held.pop(GATE)}))(wrong)
    assert main(["convert", "verify", str(hf), str(wrong)]) == 1
    out = capsys.readouterr().out
    assert all(name in out for name in (GATE, UP, "extra", "[48, 32]", "[32, 48]"))
    assert "log-probs were not compared" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["HF"], "1 checkpoints"),
        (["HF", "HF", "HF"], "3 checkpoints"),
        (["HF", "nowhere"], "no such directory"),
        (["--hf", "HF", "--megatron", "nowhere"], "no such directory"),
        (["--hf", "HF", "--megatron", "HF"], "is an HF checkpoint"),
        (["HF", "HF", "parallel.tp=2"], "parallel.tp=2"),
        (["HF", "HF", "--tokens", "1"], "--tokens"),
        (["HF", "HF", "--tolerance", "nan"], "--tolerance"),
        (["HF", "HF", "--json", "no/such/file"], "--json"),
        (["HF", "MEGATRON", "parallel.tp=3"], "parallel.tp=3"),
        (["HF", "MEGATRON", "steps=3"], "steps=3"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    words: list[str], named: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    megatron = convert(hf, tmp_path / "megatron")
    capsys.readouterr()
    paths = {"HF": str(hf), "MEGATRON": str(megatron)}
    assert main(["convert", "verify", *(paths.get(word, word) for word in words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert named in err


def test_what_megatron_cannot_load_is_one_line(hf: Path, tmp_path: Path):
    megatron = convert(hf, tmp_path / "megatron")
    with zipfile.ZipFile(megatron / "common.pt", "w"):
        pass  # an archive, but none of torch
    done = run("convert", "verify", hf, megatron)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "Megatron-Core cannot load it" in done.err


def test_the_tool_is_the_command(hf: Path):
    done = run_python("tools/verify_conversion.py", hf, hf, "--no-logits")
    assert (done.code, done.err) == (0, "")
    assert "verdict    same" in done.out
