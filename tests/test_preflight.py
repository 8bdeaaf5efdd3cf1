from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.layout import Layout
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.preflight import Preflight, preflight, prepare
from tests.run_files import VOCABULARY, RunFiles, write_run_files, write_tokenizer


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> RunFiles:
    return write_run_files(tmp_path, tiny_model_dir())


def config_of(files: RunFiles, *more: str) -> Config:
    return load_config(None, [*files.settings, *more])


def refused(config: Config, world_size: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        preflight(config, world_size)
    return str(error.value)


def test_a_run_that_can_start_says_what_it_will_be(files: RunFiles):
    config = config_of(files, "parallel.tp=2", "megatron.recompute_granularity=full")
    assert preflight(config, None) == Preflight(
        config, read_architecture(files.model), Layout(tp=2, pp=1, vpp=1, dp=1, world=2)
    )
    assert preflight(config, 4).layout.dp == 2


def test_settings_are_checked_before_files(files: RunFiles):
    assert refused(config_of(files, "model.path=/none", "rollout.top_p=2")).startswith(
        "rollout.top_p=2.0: is out of range"
    )


def test_a_missing_model_is_refused(files: RunFiles):
    assert refused(config_of(files, "model.path=/none")).startswith("/none: no such directory")


def test_a_layer_that_the_model_does_not_have_is_refused(files: RunFiles):
    assert refused(config_of(files, "bupo.target_layer=4")) == (
        "bupo.target_layer=4: is the last layer of a 4-layer model, whose policy is the full "
        "policy; choose 1..3"
    )


def test_weights_that_config_json_contradicts_are_refused(files: RunFiles):
    path = files.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    message = refused(config_of(files))
    assert message.startswith(f"{files.model / 'model.safetensors'}: model.layers.0.mlp.")
    assert "on disk, but config.json gives" in message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(files: RunFiles, tmp_path: Path):
    write_tokenizer(files.model, VOCABULARY | {"<think>": 64})
    problem = (
        "its tokenizer has the token '<think>' with id 64, but the model's vocabulary ends at 63; "
        "set model.tokenizer to the tokenizer of this model"
    )
    assert refused(config_of(files)) == f"model.path={files.model}: {problem}"
    other = tmp_path / "tokenizer"
    other.mkdir()
    (files.model / "tokenizer.json").rename(other / "tokenizer.json")
    named = config_of(files, f"model.tokenizer={other}")
    assert refused(named) == f"model.tokenizer={other}: {problem}"


def test_a_model_with_more_rows_than_the_tokenizer_has_tokens_is_fine(files: RunFiles):
    write_tokenizer(files.model, VOCABULARY | {"<think>": 63})
    preflight(config_of(files), None)


def test_a_model_without_a_tokenizer_asks_for_one(files: RunFiles, tmp_path: Path):
    files.model.joinpath("tokenizer.json").unlink()
    message = refused(config_of(files))
    assert message.startswith(
        f"model.path={files.model}: the directory has no tokenizer.json; set model.tokenizer to "
    )
    write_tokenizer(tmp_path, VOCABULARY)
    preflight(config_of(files, f"model.tokenizer={tmp_path}"), None)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "unheard of"}}'])
def test_a_broken_tokenizer_is_named(files: RunFiles, text: str):
    path = files.model / "tokenizer.json"
    path.write_text(text)
    assert refused(config_of(files)).startswith(f"{path}: cannot be read (")


def test_a_row_without_an_answer_is_named_by_its_number(files: RunFiles):
    with files.data.open("a") as file:
        file.write('{"prompt": "1+1="}\n')
    message = refused(config_of(files))
    assert "10" in message
    assert "answer" in message
    assert str(files.data) in message


def test_missing_data_is_named(files: RunFiles):
    assert "none.jsonl" in refused(config_of(files, "data.train=none.jsonl"))


def test_a_reward_function_that_does_not_import_is_named(files: RunFiles):
    message = refused(config_of(files, "reward.function=no_such_module:reward"))
    assert message.startswith("reward.function=no_such_module:reward: ")


def test_a_native_key_that_megatron_does_not_have_is_named(files: RunFiles):
    message = refused(config_of(files, "megatron.recompute_granularty=full"))
    assert message.startswith("megatron.recompute_granularty=full: no such field in ")
    assert message.endswith("did you mean megatron.recompute_granularity?")


def test_prepare_is_called_once_with_the_config(
    files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = (
        "calls = []\nclass Maker:\n    @staticmethod\n    def make(config): calls.append(config)\n"
    )
    (tmp_path / "preparation_of_a_test.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_of(files, "prepare=preparation_of_a_test:Maker.make")
    prepare(config)
    import preparation_of_a_test  # type: ignore[import-not-found]

    assert preparation_of_a_test.calls == [config]
    prepare(replace(config, prepare=None))
    assert len(preparation_of_a_test.calls) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("make", "is not an import path"),
        ("json:", "is not an import path"),
        ("no_such_module:make", "does not import (ModuleNotFoundError: No module named 'no_such"),
        ("json:no_such_function", "does not import (AttributeError: module 'json' has no "),
        ("json:__name__", "is not a function"),
    ],
)
def test_a_prepare_that_cannot_be_called_is_named(files: RunFiles, name: str, reason: str):
    with pytest.raises(InputError) as error:
        prepare(config_of(files, f"prepare={name!r}"))
    assert str(error.value).startswith(f"prepare={name}: {reason}")
    assert str(error.value).endswith("; write package.module:function")
