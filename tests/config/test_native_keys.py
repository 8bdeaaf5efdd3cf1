from __future__ import annotations

import dataclasses

import pytest

from megatron_bupo.config import Config, flatten, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.native_keys import _REASONS, refuse_owned_keys
from megatron_bupo.errors import InputError


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("tensor_model_parallel_size", "parallel.tp"),
        ("pipeline_model_parallel_size", "parallel.pp"),
        ("virtual_pipeline_model_parallel_size", "parallel.vpp"),
        ("sequence_parallel", "parallel.sp"),
        ("use_distributed_optimizer", "parallel.distributed_optimizer"),
        ("lr", "optimizer.lr"),
        ("adam_beta1", "optimizer.betas"),
        ("bf16", "model.dtype"),
        ("num_layers", "model.path"),
        ("hidden_size", "model.path"),
        ("expert_model_parallel_size", "parallel.ep"),
        ("moe_router_topk", "model.path"),
    ],
)
def test_a_key_that_is_ours_is_refused_with_our_name_for_it(key: str, ours: str):
    with pytest.raises(InputError) as error:
        refuse_owned_keys({"recompute_granularity": "full", key: 2})
    assert str(error.value).startswith(f"megatron.{key}=2: ")
    assert ours in str(error.value)


@pytest.mark.parametrize("key", ["enable_cuda_graph", "cuda_graph_impl", "mtp_num_layers"])
def test_what_cannot_follow_a_change_of_depth_is_refused(key: str):
    with pytest.raises(InputError, match=rf"^megatron\.{key}=1: .*phase"):
        refuse_owned_keys({key: 1})


def test_other_native_keys_pass_through():
    refuse_owned_keys({"recompute_granularity": "full", "check_for_nan_in_grad": True, "new": 1})
    refuse_owned_keys({"overlap_grad_reduce": True, "align_param_gather": True})


def test_parameters_are_gathered_only_where_they_are_sharded():
    overrides = ["model.path=model", "data.train=none", "megatron.overlap_param_gather=true"]
    with pytest.raises(InputError, match=r"set parallel\.distributed_optimizer=true"):
        check(load_config(None, overrides), None)
    check(load_config(None, [*overrides, "parallel.distributed_optimizer=true"]), None)


def test_every_way_out_names_keys_that_exist():
    known = flatten(Config())
    for _, way_out in _REASONS.values():
        named = [word.strip(".,") for word in way_out.split() if "." in word.strip(".,")]
        assert all(word in known or word.startswith("megatron.") for word in named), way_out


def test_every_refused_key_is_one_that_megatron_has_or_had():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    natives = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    known = {field.name for native in natives for field in dataclasses.fields(native)}
    came_or_went = {"external_cuda_graph", "enable_cuda_graph", "cuda_graph_impl"}
    came_or_went |= {"optimizer_cuda_graph", "grad_norm_skip_threshold", "num_buckets"}
    came_or_went |= {"moe_router_force_biased", "moe_expert_rank_capacity_factor"}
    assert set(_REASONS) <= known | came_or_went
