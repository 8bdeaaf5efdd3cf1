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


EMBEDDING = "account_for_embedding_in_pipeline_split"
LOSS = "account_for_loss_in_pipeline_split"
UNEVEN: list[dict[str, Any]] = [
    *({FIRST: first, LAST: last} for first, last in product([None, 2, 4], repeat=2)),
    *({EMBEDDING: True, LOSS: loss} for loss in (False, True)),
    {LOSS: True},
]


def divides(layers: int, pp: int, vpp: int, megatron: dict[str, Any]) -> bool:
    """Is this a layout that we allow?"""
    parallel = ParallelConfig(pp=pp, vpp=vpp)
    try:
        check_layers_divide(layers, Config(parallel=parallel, megatron=megatron))
    except InputError:
        return False
    return pp > 1 or vpp == 1


CASES = [
    case for case in product([7, 8, 11, 12, 14, 16], [1, 2, 4], [1, 2], UNEVEN) if divides(*case)
]


def test_many_layouts_are_compared_with_megatron():
    assert len(CASES) > 60
    for key in (FIRST, LAST, EMBEDDING, LOSS):
        for vpp in (1, 2):
            assert sum(bool(case[3].get(key)) for case in CASES if case[2] == vpp) >= 3


@pytest.mark.parametrize(("layers", "pp", "vpp", "megatron"), CASES)
def test_layers_go_where_megatron_puts_them(
    layers: int, pp: int, vpp: int, megatron: dict[str, Any]
):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    defaults = {FIRST: None, LAST: None, EMBEDDING: False, LOSS: False}
    native: Any = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=None,
        **defaults | megatron,
    )

    def chunk(stage: int, virtual: int | None) -> range:
        offset = get_transformer_layer_offset(native, virtual, stage)
        return range(offset + 1, offset + 1 + get_num_layers_to_build(native, virtual, stage))

    virtual_stages = list(range(vpp)) if vpp > 1 else [None]
    theirs = [[chunk(stage, virtual) for virtual in virtual_stages] for stage in range(pp)]
    assert layers_of_stages(layers, Layout(1, pp, vpp, 1, pp), megatron) == theirs


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


def test_two_ways_to_deal_out_layers_are_refused():
    keys = [f"megatron.{LAST}=2", f"megatron.{EMBEDDING}=true"]
    config = load_config(None, [*NEEDED, "parallel.pp=2", *keys])
    with pytest.raises(InputError, match="two ways to deal out layers"):
        check_layers_divide(7, config)


@pytest.mark.parametrize(
    ("overrides", "layers", "choice"),
    [
        (["parallel.pp=2", "parallel.vpp=2"], 6, "3"),  # not 1, which cannot be interleaved
        (["parallel.pp=4"], 6, "1, 2, 3, 6"),
        (["parallel.pp=2", f"megatron.{LOSS}=true"], 8, "3"),
        (["parallel.pp=2", "parallel.vpp=2"], 7, "none with this vpp"),
    ],
)
def test_a_pipeline_that_does_not_divide_is_told_which_ones_would(
    overrides: list[str], layers: int, choice: str
):
    config = load_config(None, [*NEEDED, *overrides])
    with pytest.raises(InputError, match=f"choose parallel.pp from {choice}, or set"):
        check_layers_divide(layers, config)
