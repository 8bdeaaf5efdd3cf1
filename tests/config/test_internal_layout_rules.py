from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.internal_layout_rules import internal_config
from megatron_bupo.config.schema import ParallelConfig
from megatron_bupo.errors import InputError
from tests.config.test_checks import Sizes

PP4 = ["parallel.pp=4", "parallel.tp=2", "bupo.target_layer=6", "bupo.internal_steps=10"]


def config_with(*overrides: str, **layout: Any) -> Config:
    """PP 4 x TP 2 for the whole model, and `layout` for internal layer 6."""
    config = load_config(None, ["model.path=model", "data.train=t.jsonl", *PP4, *overrides])
    internal = ParallelConfig(**layout)
    return replace(config, bupo=replace(config.bupo, internal_layout=internal))


def check_all(config: Config) -> None:
    check(config, None)
    check_against_model(config, Sizes())


def test_the_same_ranks_laid_out_for_the_lower_layers_pass():
    for layout in [{}, {"tp": 2, "dp": 4}, {"pp": 2, "tp": 4, "sp": True}, {"pp": 2, "vpp": 3}]:
        check_all(config_with(**layout))


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        ([], {"tp": 0}, "bupo.internal_layout.tp=0: is out of range; must be at least 1"),
        (
            [],
            {"tp": 2, "dp": 2},
            (
                "bupo.internal_layout: tp 2 x cp 1 x pp 1 x dp 2: does not give the 8 ranks of "
                "parallel, and both run on the same ones; leave bupo.internal_layout.dp out"
            ),
        ),
        (
            [],
            {"pp": 3},
            (
                "bupo.internal_layout: tp 1 x cp 1 x pp 3: does not give the 8 ranks of parallel, "
                "and both run on the same ones; choose sizes whose product divides 8"
            ),
        ),
        (
            ["parallel.distributed_optimizer=true"],
            {},
            (
                "bupo.internal_layout.distributed_optimizer=false: the optimizer's state goes on "
                "under parallel.distributed_optimizer=true; set "
                "bupo.internal_layout.distributed_optimizer=true"
            ),
        ),
        (
            [],
            {"sp": True},
            (
                "bupo.internal_layout.sp=true: splits sequences over the tensor-parallel ranks, "
                "and bupo.internal_layout.tp=1; set bupo.internal_layout.tp to 2 or more, or "
                "bupo.internal_layout.sp=false"
            ),
        ),
        (
            [],
            {"pp": 4},
            (
                "bupo.internal_layout.pp=4: does not divide the 6 layers of the phase that trains "
                "layer 6; choose bupo.internal_layout.pp from 1, 2, 3, 6"
            ),
        ),
        (
            [],
            {"pp": 2, "vpp": 2},
            (
                "bupo.internal_layout.pp=2, bupo.internal_layout.vpp=2: does not divide the 6 "
                "layers of the phase that trains layer 6; choose bupo.internal_layout.pp from 1, 3"
            ),
        ),
        (
            ["parallel.tp=1", "parallel.dp=4"],
            {"tp": 16},
            (
                "bupo.internal_layout.tp=16: does not divide the model's 8 key-value heads; choose "
                "1 or 2 or 4 or 8"
            ),
        ),
    ],
)
def test_what_does_not_fit_names_its_key_and_the_way_out(
    overrides: list[str], layout: dict[str, Any], message: str
):
    config = config_with(*overrides, **layout)
    with pytest.raises(InputError) as error:
        check_all(config)
    assert str(error.value) == message


def test_each_stage_of_a_schedule_is_checked():
    overrides = ["bupo.target_layer=null", "bupo.internal_steps=0"]
    stages = "bupo.stages=[{layer: 4, steps: 1}, {layer: 6, steps: 1}]"
    config = config_with(*overrides, stages, pp=4)
    with pytest.raises(InputError, match="the 6 layers of the phase that trains layer 6"):
        check_against_model(config, Sizes())


def test_without_an_internal_phase_it_is_not_looked_at():
    check_all(config_with("bupo.internal_steps=0", pp=3))


def test_uneven_stages_of_the_whole_model_are_none_of_the_lower_part():
    config = config_with("megatron.num_layers_in_first_pipeline_stage=6", pp=2)
    check_against_model(config, Sizes())
    assert internal_config(config).parallel == ParallelConfig(pp=2)
    assert internal_config(config).megatron == {}
