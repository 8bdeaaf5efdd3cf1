from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.layout import (
    Layout,
    check_layers_divide,
    layers_of_stages,
    parallel_sizes,
)
from megatron_bupo.config.schema import ParallelConfig
from megatron_bupo.errors import InputError

NEEDED = ["model.path=model", "data.train=train.jsonl"]


def sizes(world_size: int | None, *overrides: str) -> Layout:
    return parallel_sizes(load_config(None, [*NEEDED, *overrides]), world_size)


def test_outside_torchrun_the_layout_needs_the_ranks_it_asks_for():
    assert sizes(None, "parallel.tp=2", "parallel.pp=3") == Layout(2, 3, 1, 1, 6)
    assert sizes(None, "parallel.tp=2", "parallel.dp=4") == Layout(2, 1, 1, 4, 8)


def test_under_torchrun_data_parallelism_takes_what_is_left():
    assert sizes(16, "parallel.tp=2", "parallel.pp=2") == Layout(2, 2, 1, 4, 16)
    assert sizes(16, "parallel.tp=2", "parallel.dp=8").dp == 8


def test_ranks_that_the_model_does_not_divide_are_refused():
    with pytest.raises(InputError) as error:
        sizes(6, "parallel.tp=2", "parallel.pp=2")
    assert str(error.value) == (
        "parallel.tp=2, parallel.pp=2: 4 ranks hold the model once, which does not divide 6 ranks; "
        "start a multiple of 4 ranks"
    )


def test_a_data_parallel_size_that_the_ranks_contradict_is_refused():
    with pytest.raises(InputError) as error:
        sizes(8, "parallel.tp=2", "parallel.dp=2")
    assert str(error.value) == (
        "parallel.dp=2: 8 ranks with parallel.tp=2, parallel.pp=1 leave parallel.dp=4; "
        "start 4 ranks, or leave parallel.dp out"
    )


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "dp"), list(product([1, 2, 4], [1, 2], [1, 3], [1, 2, 3]))
)
def test_groups_are_those_that_megatron_makes(tp: int, cp: int, pp: int, dp: int):
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(tp, pp, 1, dp, tp * cp * pp * dp, cp=cp)
    ranks = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    assert layout.tensor_groups() == ranks.get_ranks("tp")
    assert layout.context_groups() == ranks.get_ranks("cp")
    assert layout.data_groups() == ranks.get_ranks("dp")
    assert [list(layout.stage_ranks(stage)) for stage in range(pp)] == [
        sorted(group) for group in ranks.get_ranks("tp-cp-dp")
    ]


@pytest.mark.parametrize(("etp", "ep"), [(None, 1), (None, 2), (1, 4), (2, 4)])
def test_expert_groups_are_those_that_megatron_makes(etp: int | None, ep: int):
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(2, 2, 1, 2, 16, cp=2, ep=ep, etp=etp)
    tp = etp or 2
    ranks = RankGenerator(tp=tp, ep=ep, dp=8 // tp // ep, pp=2, cp=1, order="tp-cp-ep-dp-pp")
    assert layout.expert_groups() == ranks.get_ranks("ep")


FIRST = "num_layers_in_first_pipeline_stage"
LAST = "num_layers_in_last_pipeline_stage"


def divides(layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> bool:
    """Is this a layout that we allow?"""
    parallel = ParallelConfig(pp=pp, vpp=vpp)
    megatron = {FIRST: first, LAST: last}
    try:
        check_layers_divide(layers, Config(parallel=parallel, megatron=megatron))
    except InputError:
        return False
    return pp > 1 or vpp == 1


CASES = [
    case
    for case in product([8, 12, 16], [1, 2, 4], [1, 2], [None, 2, 4], [None, 2, 4])
    if divides(*case)
]


def test_many_layouts_are_compared_with_megatron():
    assert len(CASES) > 30


@pytest.mark.parametrize(("layers", "pp", "vpp", "first", "last"), CASES)
def test_layers_go_where_megatron_puts_them(
    layers: int, pp: int, vpp: int, first: int | None, last: int | None
):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    native: Any = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )

    def chunk(stage: int, virtual: int | None) -> range:
        offset = get_transformer_layer_offset(native, virtual, stage)
        return range(offset + 1, offset + 1 + get_num_layers_to_build(native, virtual, stage))

    virtual_stages = list(range(vpp)) if vpp > 1 else [None]
    megatron = [[chunk(stage, virtual) for virtual in virtual_stages] for stage in range(pp)]
    layout = Layout(1, pp, vpp, 1, pp)
    assert layers_of_stages(layers, layout, {FIRST: first, LAST: last}) == megatron


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["parallel.pp=4", "megatron.num_layers_in_first_pipeline_stage=2"], 8),  # 6 over 3
        (["parallel.pp=2", "parallel.vpp=2"], 8),
        (["parallel.pp=2", "megatron.num_layers_in_last_pipeline_stage=3"], 8),
    ],
)
def test_every_layer_stands_once_in_the_layout(overrides: list[str], layers: int):
    config = load_config(None, [*NEEDED, *overrides])
    check_layers_divide(layers, config)
    stages = layers_of_stages(layers, parallel_sizes(config, None), config.megatron)
    held = [layer for chunks in stages for chunk in chunks for layer in chunk]
    assert sorted(held) == list(range(1, layers + 1))


@pytest.mark.parametrize("value", ["0", "-1", "true", "x"])
def test_a_first_stage_that_is_not_a_number_of_layers_is_refused(value: str):
    key = "megatron.num_layers_in_first_pipeline_stage"
    config = load_config(None, [*NEEDED, "parallel.pp=2", f"{key}={value}"])
    with pytest.raises(InputError, match="is not a positive number of layers"):
        check_layers_divide(8, config)


def test_two_uneven_stages_that_leave_none_between_cannot_be_interleaved():
    uneven = [f"megatron.{FIRST}=4", f"megatron.{LAST}=4"]
    config = load_config(None, [*NEEDED, "parallel.pp=2", "parallel.vpp=2", *uneven])
    with pytest.raises(InputError, match="leave one of the two out"):
        check_layers_divide(8, config)


def test_an_uneven_stage_without_a_pipeline_is_refused():
    config = load_config(None, [*NEEDED, "megatron.num_layers_in_last_pipeline_stage=2"])
    with pytest.raises(InputError, match=r"needs parallel\.pp > 1"):
        check_layers_divide(8, config)
