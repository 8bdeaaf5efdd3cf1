"""Damaged checkpoints: one line that names the file or the key, or the right result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.cli import main
from megatron_bupo.config import load_config
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.preflight import check_vocabulary
from tests import damaged_hf, damaged_tokenizer, damaged_torch_dist
from tests.damaged_hf import SAME
from tests.small_tokenizers import byte_level


@pytest.fixture(scope="module")
def hf(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(layers=2)


@pytest.fixture(scope="module")
def torch_dist(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "torch_dist"
    layout = ["parallel.tp=2", "parallel.pp=2"]
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(out), *layout]) == 0
    return out


def to_megatron(hf: Path, out: Path) -> int:
    return main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(out)])


def to_hf(torch_dist: Path, out: Path) -> int:
    return main(["convert", "megatron-to-hf", "--megatron", str(torch_dist), "--out", str(out)])


def holds_the_same(out: Path, hf: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, hf))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def copy(original: Path, folder: Path) -> Path:
    out = folder / "damaged"
    shutil.copytree(original, out)
    return out


def is_one_line_that_names(named: str, err: str, folder: Path) -> bool:
    """The paths of the test itself are no names."""
    line = err.replace(str(folder), "")
    return line.startswith("error: ") and line.count("\n") == 1 and named in line


@pytest.mark.parametrize("name", damaged_hf.MUTATIONS)
def test_a_damaged_hf_directory_is_refused_by_name(
    name: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mutate, named = damaged_hf.MUTATIONS[name]
    damaged, out = copy(hf, tmp_path), tmp_path / "out"
    mutate(damaged)
    code = to_megatron(damaged, out)
    if named == SAME:
        assert code == 0
        assert to_hf(out, tmp_path / "back") == 0
        assert holds_the_same(tmp_path / "back", hf)
    else:
        assert code == 2
        assert is_one_line_that_names(named, capsys.readouterr().err, tmp_path)
        assert not out.exists()


@pytest.mark.parametrize("name", damaged_torch_dist.MUTATIONS)
def test_a_damaged_torch_dist_directory_is_refused_by_name(
    name: str, hf: Path, torch_dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mutate, named = damaged_torch_dist.MUTATIONS[name]
    damaged, out = copy(torch_dist, tmp_path), tmp_path / "out"
    mutate(damaged)
    code = to_hf(damaged, out)
    if named == SAME:
        assert code == 0
        assert holds_the_same(out, hf)
    else:
        assert code == 2
        assert is_one_line_that_names(named, capsys.readouterr().err, tmp_path)
        assert not out.exists()
    assert not (tmp_path / "exploded").exists()


TEXT = "What is 3 + 4? Let us think."


def read_tokenizer(model_dir: Path) -> list[int]:
    """`TEXT` as training reads it, after what it checks."""
    check_vocabulary(load_config(None, [f"model.path={model_dir}"]), read_architecture(model_dir))
    return load_tokenizer(str(model_dir)).encode(TEXT)


@pytest.fixture(scope="module")
def with_tokenizer(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level([TEXT], size=300))
    model_dir = copy(tiny_model_dir(layers=2, vocab=300), tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(model_dir)
    return model_dir


@pytest.mark.parametrize("name", damaged_tokenizer.MUTATIONS)
def test_a_damaged_tokenizer_is_refused_by_name(name: str, with_tokenizer: Path, tmp_path: Path):
    mutate, named = damaged_tokenizer.MUTATIONS[name]
    damaged = copy(with_tokenizer, tmp_path)
    mutate(damaged)
    if named == SAME:
        assert read_tokenizer(damaged) == read_tokenizer(with_tokenizer)
    else:
        with pytest.raises(InputError) as error:
            read_tokenizer(damaged)
        line = f"error: {error.value}\n"
        assert is_one_line_that_names(named, line, tmp_path), line
