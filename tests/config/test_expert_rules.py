from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.errors import InputError


@dataclass(frozen=True)
class Experts:
    layers: tuple[int, ...] = tuple(range(1, 49))
    number: int = 12
    ffn_size: int = 768


@dataclass(frozen=True)
class Sizes:
    experts: Experts | None
    layers: int = 48
    heads: int = 32
    kv_heads: int = 4
    ffn_size: int = 6146  # that of layers without experts, of which there are none
    max_positions: int = 40960
    tied: bool = False


def refusal(ranks: int, experts: Experts | None, *overrides: str) -> str | None:
    config = load_config(None, ["model.path=model", "data.train=train.jsonl", *overrides])
    try:
        check(config, ranks)
        check_against_model(config, Sizes(experts))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, "parallel.ep=4"),
        (4, "parallel.tp=2 parallel.sp=true parallel.ep=2"),
        (4, "parallel.tp=2 parallel.sp=true parallel.ep=4 parallel.etp=1"),
        (4, "parallel.cp=2 parallel.ep=4"),
        (4, "parallel.pp=2 parallel.ep=2"),
        (1, "megatron.moe_aux_loss_coeff=0.001 megatron.moe_token_dispatcher_type=flex"),
        (1, "megatron.moe_router_dtype=fp64 megatron.moe_router_load_balancing_type=none"),
    ],
)
def test_layouts_of_experts_that_pass(ranks: int, overrides: str):
    assert refusal(ranks, Experts(), *overrides.split()) is None


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (
            6,
            "parallel.ep=4",
            (
                "parallel.ep=4, parallel.etp=1: 4 ranks hold all experts of a layer, which does "
                "not divide the 6 ranks of a pipeline stage; choose parallel.ep from 1, 2, 3, 6"
            ),
        ),
        (
            4,
            "parallel.pp=2 parallel.ep=4",
            (
                "parallel.ep=4, parallel.etp=1: 4 ranks hold all experts of a layer, which does "
                "not divide the 2 ranks of a pipeline stage; choose parallel.ep from 1, 2"
            ),
        ),
        (2, "parallel.etp=4", "parallel.ep=1, parallel.etp=4: 4 ranks hold all experts of a layer"),
        (
            8,
            "parallel.ep=8",
            (
                "parallel.ep=8: does not divide the model's 12 experts; choose parallel.ep from 1, "
                "2, 3, 4, 6"
            ),
        ),
        (
            5,
            "parallel.etp=5",
            "parallel.etp=5: does not divide the model's 768 channels of each expert; choose ",
        ),
        (
            2,
            "parallel.tp=2",
            (
                "parallel.tp=2, parallel.sp=false: every tensor-parallel rank would send the same "
                "tokens to the experts; set parallel.sp=true"
            ),
        ),
        (
            1,
            "megatron.moe_token_dispatcher_type=allgather",
            (
                "megatron.moe_token_dispatcher_type=allgather: is not offered: rows differ in "
                "length; choose alltoall or flex"
            ),
        ),
        (
            1,
            "megatron.moe_router_load_balancing_type=seq_aux_loss",
            "megatron.moe_router_load_balancing_type=seq_aux_loss: is not offered: rows are ",
        ),
        (
            1,
            "megatron.moe_aux_loss_coeff=[0.1]",
            "megatron.moe_aux_loss_coeff=[0.1]: is not a number of at least 0",
        ),
        (
            1,
            "megatron.moe_expert_capacity_factor=1.25",
            "megatron.moe_expert_capacity_factor=1.25: an expert that drops tokens makes a ",
        ),
        (1, "megatron.moe_z_loss_coeff=0.1", "megatron.moe_z_loss_coeff=0.1: its share of a "),
    ],
)
def test_what_experts_cannot_be_combined_with_is_refused_by_name(
    ranks: int, overrides: str, message: str
):
    refused = refusal(ranks, Experts(), *overrides.split())
    assert refused is not None
    assert refused.startswith(message), refused


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("parallel.ep=2", "shares experts, and layers 1 to 48 have none"),
        ("parallel.etp=1", "shares experts, and layers 1 to 48 have none"),
        ("megatron.moe_aux_loss_coeff=0.1", "speaks of experts, and the model has none"),
    ],
)
def test_a_model_without_experts_shares_none(override: str, reason: str):
    assert refusal(2, None, override) == f"{override}: {reason}; remove it"


@pytest.mark.parametrize(
    ("layout", "refused"),
    [
        ("{dp: 2}", None),
        (
            "{ep: 2}",
            "bupo.internal_layout.ep=2: shares experts, and layers 1 to 2 have none; remove it",
        ),
        (
            "{ep: 4}",
            (
                "bupo.internal_layout.ep=4, bupo.internal_layout.etp=1: 4 ranks hold all experts "
                "of a layer, which does not divide the 2 ranks of a pipeline stage; choose "
                "bupo.internal_layout.ep from 1, 2"
            ),
        ),
    ],
)
def test_an_internal_layout_shares_the_experts_of_its_own_layers(layout: str, refused: str | None):
    overrides = ["bupo.target_layer=2", "bupo.internal_steps=1", f"bupo.internal_layout={layout}"]
    config = ["megatron.moe_aux_loss_coeff=0.1", "parallel.ep=2", *overrides]
    assert refusal(2, Experts(layers=tuple(range(3, 49))), *config) == refused


def test_channels_of_dense_layers_count_where_there_are_any():
    layout = ["parallel.tp=4", "parallel.sp=true"]
    assert refusal(4, Experts(), *layout) is None
    refused = refusal(4, Experts(layers=tuple(range(2, 49))), *layout)
    assert refused is not None
    assert refused.startswith("parallel.tp=4: does not divide the model's 6146 MLP channels; ")


def test_a_stage_without_experts_is_refused_under_the_distributed_optimizer():
    half = Experts(layers=tuple(range(1, 25)))
    distributed = "parallel.distributed_optimizer=true"
    assert refusal(2, half, "parallel.pp=2", distributed) == (
        "parallel.pp=2, parallel.distributed_optimizer=true: no layer of stage 1 has experts, and "
        "then Megatron-Core cannot write the optimizer's checkpoint; choose fewer stages, or "
        "parallel.distributed_optimizer=false"
    )
    assert refusal(2, half, "parallel.pp=2") is None
    assert refusal(2, half, "parallel.pp=2", "parallel.vpp=2", distributed) is None
    assert refusal(2, Experts(layers=(1, 48)), "parallel.pp=2", distributed) is None
    assert refusal(2, half, distributed) is None
