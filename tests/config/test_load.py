from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bupo.config import Config, expand, flatten, load_config, to_yaml
from megatron_bupo.config.checks import check
from megatron_bupo.config.schema import ParallelConfig, StageConfig
from megatron_bupo.errors import InputError

NEEDED = ["model.path=model", "data.train=train.jsonl"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_what_is_not_set_has_the_schemas_default():
    config = load_config(None, NEEDED)
    defaults = Config()
    assert config == dataclasses.replace(
        defaults,
        model=dataclasses.replace(defaults.model, path="model"),
        data=dataclasses.replace(defaults.data, train="train.jsonl"),
    )


def test_overrides_win_over_the_file_and_the_file_over_what_it_builds_on(tmp_path: Path):
    write(tmp_path / "base.yaml", "steps: 1\nseed: 1\nparallel: {tp: 2, pp: 2}\n")
    file = write(tmp_path / "run.yaml", "defaults: base.yaml\nseed: 2\nparallel: {pp: 4}\nsteps: 2")
    config = load_config(file, [*NEEDED, "steps=3", "steps=4"])
    assert (config.steps, config.seed, config.parallel.tp, config.parallel.pp) == (4, 2, 2, 4)


def test_of_several_files_to_build_on_the_later_wins_and_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.yaml", "steps: 1\nseed: 1\nmegatron: {x: 1, deep: {y: 1}}\n")
    write(tmp_path / "b.yaml", "steps: 2\nmegatron: {z: 2, deep: {w: 2}}\n")
    file = write(tmp_path / "sub" / "run.yaml", "defaults: [../a.yaml, ../b.yaml]\n")
    monkeypatch.chdir("/")
    config = load_config(file, NEEDED)
    assert (config.steps, config.seed) == (2, 1)
    assert config.megatron == {"x": 1, "z": 2, "deep": {"y": 1, "w": 2}}


def test_inheritance_ends_after_one_level(tmp_path: Path):
    write(tmp_path / "a.yaml", "defaults: nothing.yaml\n")
    file = write(tmp_path / "b.yaml", "defaults: a.yaml\n")
    with pytest.raises(InputError, match=r"a\.yaml: defaults=nothing\.yaml: .*one level deep; "):
        load_config(file, NEEDED)


def test_values_on_the_command_line_are_yaml():
    overrides = [
        "optimizer.lr=1e-6",
        "optimizer.betas=[0.8, 0.9]",
        "bupo.stages=[{layer: 2, steps: 3}, {layer: 4, steps: 5}]",
        "model.tokenizer=null",
        "parallel.sp=true",
        "data.system_prompt='a: b=c'",
        "run_dir=a=b",
        "megatron.recompute_granularity=full",
        "sglang={mem_fraction_static: 0.8}",
        "evaluation={every: 5}",
    ]
    config = load_config(None, [*NEEDED, *overrides])
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.bupo.stages == [StageConfig(2, 3), StageConfig(4, 5)]
    assert config.model.tokenizer is None
    assert config.parallel.sp is True
    assert config.data.system_prompt == "a: b=c"
    assert config.run_dir == "a=b"
    assert config.megatron == {"recompute_granularity": "full"}
    assert config.sglang == {"mem_fraction_static": 0.8}
    assert config.evaluation.every == 5


def test_stages_may_be_written_without_spaces():
    tight = load_config(None, [*NEEDED, "bupo.stages=[{layer:2,steps:3},{layer:4,steps:5}]"])
    assert tight.bupo.stages == [StageConfig(2, 3), StageConfig(4, 5)]


LAYOUT = "bupo.internal_layout"


def test_a_section_that_may_be_null_begins_with_its_defaults_and_can_be_turned_off_again(
    tmp_path: Path,
):
    file = write(tmp_path / "run.yaml", "bupo: {internal_layout: {tp: 2, cp: 2}}\n")
    layouts = [
        load_config(path, [*NEEDED, *overrides]).bupo.internal_layout
        for path, overrides in [
            (None, []),
            (None, [f"{LAYOUT}.tp=1", f"{LAYOUT}.dp=4"]),
            (None, [f"{LAYOUT}={{}}"]),
            (file, []),
            (file, [f"{LAYOUT}.dp=2", f"{LAYOUT}={{tp:4}}"]),
            (file, [f"{LAYOUT}=null"]),
            (file, [f"{LAYOUT}=null", f"{LAYOUT}.pp=2"]),
        ]
    ]
    assert layouts == [
        None,
        ParallelConfig(tp=1, dp=4),
        ParallelConfig(),
        ParallelConfig(tp=2, cp=2),
        ParallelConfig(tp=4, cp=2, dp=2),
        None,
        ParallelConfig(pp=2),
    ]


def test_a_mapping_of_numbers_is_set_whole_or_one_by_one(tmp_path: Path):
    file = write(tmp_path / "run.yaml", "optimizer: {lr_factors: {1-6: 0.1, 7: 2}}\n")
    more = ['optimizer.lr_factors={"1-6":0.5,embedding:0}', "optimizer.lr_factors.9=3"]
    factors = load_config(file, [*NEEDED, *more]).optimizer.lr_factors
    assert factors == {"1-6": 0.5, "7": 2.0, "embedding": 0.0, "9": 3.0}


def test_a_list_replaces_the_one_it_builds_on(tmp_path: Path):
    file = write(tmp_path / "run.yaml", "bupo: {stages: [{layer: 1, steps: 1}]}\n")
    config = load_config(file, [*NEEDED, "bupo.stages=[{layer: 2, steps: 2}]"])
    assert config.bupo.stages == [StageConfig(2, 2)]


def test_a_section_with_nothing_in_it_changes_nothing(tmp_path: Path):
    file = write(tmp_path / "run.yaml", "model:\n  # path: later\nmegatron: {}\n")
    assert load_config(file, NEEDED) == load_config(None, NEEDED)


def test_an_empty_file_changes_nothing(tmp_path: Path):
    assert load_config(write(tmp_path / "run.yaml", ""), NEEDED) == load_config(None, NEEDED)


def test_settings_may_refer_to_each_other():
    config = load_config(None, [*NEEDED, "model.tokenizer=${model.path}/tok", "seed=7"])
    assert config.model.tokenizer == "model/tok"


@pytest.mark.parametrize("path", ["~/models/x", "models/x", "/models/x", "org/name", "hf://x"])
def test_a_path_stays_as_it_was_written_until_it_is_expanded(
    path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(None, [*NEEDED, f"model.path={path}"]).model.path == path
    assert expand(path) == path.replace("~", "/home/someone")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pth=x", "model.pth (command line): unknown key; the nearest key is model.path"),
        ("modle.path=x", "modle.path (command line): unknown key; the nearest key is model.path"),
        ("lr=1", "lr (command line): unknown key; the nearest key is optimizer.lr"),
        ("steps.a=1", "steps.a (command line): unknown key; the nearest key is steps"),
        ("paralel=1", "paralel (command line): unknown key; the nearest key is parallel"),
        (
            "bupo.stages=[{layr: 1, steps: 1}]",
            "bupo.stages.layr (command line): unknown key; the nearest key is bupo.stages.layer",
        ),
        ("steps=many", "steps=many (command line): must be a whole number"),
        ("steps=1.5", "steps=1.5 (command line): must be a whole number"),
        ("steps=", "steps=null (command line): must be a whole number"),
        ("rollout.temperature=warm", "rollout.temperature=warm (command line): must be a number"),
        ("parallel.dp=x", "parallel.dp=x (command line): must be a whole number or null"),
        ("parallel.sp=maybe", "parallel.sp=maybe (command line): must be true or false"),
        ("model.path=[a]", "model.path=['a'] (command line): must be text"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9 (command line): must be a list of 2 numbers"),
        ("optimizer.betas=[1]", "optimizer.betas=[1] (command line): must be a list of 2 numbers"),
        ("bupo.stages=3", "bupo.stages=3 (command line): must be a list of {layer, steps}"),
        (
            f"{LAYOUT}.tpp=2",
            f"{LAYOUT}.tpp (command line): unknown key; the nearest key is {LAYOUT}.tp",
        ),
        (
            f"{LAYOUT}={{sq: true}}",
            f"{LAYOUT}.sq (command line): unknown key; the nearest key is {LAYOUT}.sp",
        ),
        (f"{LAYOUT}={{tp: x}}", f"{LAYOUT}.tp=x (command line): must be a whole number"),
        (f"{LAYOUT}=3", f"{LAYOUT}=3 (command line): must be a mapping of settings or null"),
        (
            "optimizer.lr_factors={embedding: slow}",
            "optimizer.lr_factors.embedding=slow (command line): must be a number",
        ),
        (
            "optimizer.lr_factors=1",
            "optimizer.lr_factors=1 (command line): must be a mapping of settings",
        ),
        ("megatron=3", "megatron=3 (command line): must be a mapping of settings"),
        ("model=3", "model=3 (command line): is a section; set keys in it: model.path=..."),
        ("steps", "steps (command line): is not of the form key=value"),
        ("=3", "=3 (command line): is not of the form key=value"),
        ("run_dir=${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_bad_override_is_named_with_what_is_wrong(override: str, message: str):
    with pytest.raises(InputError) as error:
        load_config(None, [*NEEDED, override])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {pth: x}", "model.pth ({file}): unknown key; the nearest key is model.path"),
        ("model.pth: x", "model.pth ({file}): unknown key; the nearest key is model.path"),
        ("steps: many", "steps=many ({file}): must be a whole number"),
        ("model: x", "model=x ({file}): is a section; set keys in it: model.path=..."),
        ("[1, 2]", "{file}: is not a mapping of settings; write `section: {{key: value}}`"),
        ("defaults: 3", "{file}: defaults=3: is not a file name or a list of file names"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str):
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError) as error:
        load_config(file, NEEDED)
    assert str(error.value) == message.format(file=file)


@pytest.mark.parametrize("text", ["a: [1,", "a: 1\na: 2\n", "\ta: 1"])
def test_a_file_that_is_not_yaml_is_named_on_one_line(tmp_path: Path, text: str):
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError, match=r"run\.yaml: is not valid YAML: .*line \d") as error:
        load_config(file, NEEDED)
    assert "\n" not in str(error.value)


def test_an_override_that_is_not_yaml_is_named():
    with pytest.raises(InputError, match=r"^bupo\.stages=\[1, \(command line\): is not valid YAML"):
        load_config(None, [*NEEDED, "bupo.stages=[1,"])


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(str(tmp_path / "none.yaml"), NEEDED)
    file = write(tmp_path / "run.yaml", "defaults: none.yaml\n")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(file, NEEDED)


@pytest.mark.parametrize("missing", [0, 1])
def test_model_and_data_must_be_given(missing: int):
    key, given = NEEDED[missing].partition("=")[0], NEEDED[1 - missing]
    with pytest.raises(InputError) as error:
        check(load_config(None, [given]), world_size=1)
    assert str(error.value) == f"{key}: has no value; set it in the YAML file or as {key}=..."


RICH = [
    *NEEDED,
    "optimizer.betas=[0.8, 0.95]",
    "bupo.stages=[{layer: 2, steps: 3}]",
    "megatron={a: {b: 1}}",
    "data.chat_template_kwargs.enable_thinking=false",
    "data.system_prompt='Be: brief\n'",
    "bupo.internal_layout.dp=2",
    "optimizer.lr_factors={7: 0.1}",
]


def test_the_resolved_yaml_loads_as_the_same_config(tmp_path: Path):
    config = load_config(None, RICH)
    assert load_config(write(tmp_path / "run.yaml", to_yaml(config)), []) == config


def test_flattened_configs_survive_json_and_tell_which_keys_changed():
    before, after = (flatten(load_config(None, more)) for more in (RICH, [*RICH, "megatron.a.b=2"]))
    assert json.loads(json.dumps(before)) == before
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"megatron.a.b"}
    assert before["optimizer.betas"] == [0.8, 0.95]
    assert before["bupo.stages"] == [{"layer": 2, "steps": 3}]
    assert before["data.chat_template_kwargs.enable_thinking"] is False


def test_every_field_of_the_schema_is_in_the_flattened_config():
    def names(section: object, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                yield from names(value, f"{prefix}{field.name}.")
            elif value != {}:
                yield prefix + field.name

    assert set(names(Config())) == set(flatten(load_config(None, NEEDED)))


def test_a_key_to_servers_is_written_down_nowhere():
    config = load_config(None, [*NEEDED, "servers.api_key=open-sesame"])
    assert config.servers.api_key == "open-sesame"
    assert "open-sesame" not in to_yaml(config) + str(flatten(config))
