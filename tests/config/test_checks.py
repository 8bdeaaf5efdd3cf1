from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_bupo.config import Config, flatten, load_config
from megatron_bupo.config.checks import CHOICES, RANGES, check, check_against_model
from megatron_bupo.config.layout import Layout
from megatron_bupo.errors import InputError

NEEDED = ["model.path=model", "data.train=train.jsonl"]


@dataclass(frozen=True)
class Sizes:
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    ffn_size: int = 9728
    max_positions: int = 40960
    tied: bool = True
    experts: None = None


def config_with(*overrides: str):
    return load_config(None, [*NEEDED, *overrides])


def test_the_defaults_pass_and_lay_out_one_rank():
    assert check(config_with(), None) == Layout(tp=1, pp=1, vpp=1, dp=1, world=1)


def test_every_choice_and_range_is_a_key_of_the_schema():
    flat = flatten(Config())
    assert {key for _, _, keys in RANGES for key in keys.split()} <= flat.keys()
    grams, internal = "hicra.grams=grams", ["bupo.target_layer=1", "bupo.internal_steps=1"]
    needs = {
        "sglang": ['servers.addresses=["http://10.0.0.1:30000"]'],  # nothing started or probed
        "placebo": [grams],
        "amplify": [grams],
        "both": [grams],
        "internal": [grams, *internal],
        "critic.optimizer.decay": ["algorithm.advantage=gae"],
    }
    for key, choices in CHOICES.items():
        for choice in choices:
            more = [*needs.get(key, []), *needs.get(choice, [])]
            check(config_with(f"{key}={choice}", *more), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "model.dtype=float16",
            "model.dtype=float16: is not one of float32, bfloat16; the nearest is bfloat16",
        ),
        (
            "optimizer.decay=cosin",
            "optimizer.decay=cosin: is not one of constant, linear, cosine; the nearest is cosine",
        ),
        (
            "algorithm.advantage=PPO",
            (
                "algorithm.advantage=PPO: is not one of grpo, dr_grpo, rloo, reinforce_plus_plus, "
                "reinforce_plus_plus_baseline, gae; the nearest is gae"
            ),
        ),
        (
            "algorithm.loss_aggregation=seq_mean",
            (
                "algorithm.loss_aggregation=seq_mean: is not one of auto, token_mean, "
                "sequence_mean, constant_length; the nearest is sequence_mean"
            ),
        ),
        (
            "algorithm.loss=GSPO",
            (
                "algorithm.loss=GSPO: is not one of clipped, gspo, cispo, unclipped; the nearest "
                "is gspo"
            ),
        ),
        ("steps=0", "steps=0: is out of range; must be at least 1"),
        ("parallel.tp=0", "parallel.tp=0: is out of range; must be at least 1"),
        ("parallel.dp=0", "parallel.dp=0: is out of range; must be at least 1"),
        ("bupo.target_layer=0", "bupo.target_layer=0: is out of range; must be at least 1"),
        ("seed=-1", "seed=-1: is out of range; must be at least 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0: is out of range; must be at least 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: is out of range; must be at least 0"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: is out of range; must be at least 0"),
        ("rollout.temperature=0", "rollout.temperature=0.0: all responses to a prompt would be "),
        ("rollout.top_p=0", "rollout.top_p=0.0: is out of range; must be greater than 0 and at "),
        ("rollout.top_p=1.1", "rollout.top_p=1.1: is out of range; must be greater than 0 and at "),
        ("algorithm.clip_low=0", "algorithm.clip_low=0.0: is out of range; must be greater than 0"),
        ("algorithm.clip_low=2", "algorithm.clip_low=2.0: is out of range; must be greater than 0"),
        ("algorithm.clip_high=0", "algorithm.clip_high=0.0: is out of range; must be greater "),
        ("algorithm.dual_clip=1", "algorithm.dual_clip=1.0: is out of range; must be greater "),
        (
            "optimizer.betas=[0.9, 1]",
            "optimizer.betas=[0.9, 1.0]: is out of range; each must be at least 0 and less than 1",
        ),
        (
            "optimizer.min_lr=1e-3",
            "optimizer.min_lr=0.001: is above optimizer.lr=1e-06; choose at most 1e-06",
        ),
        (
            "bupo.internal_steps=30",
            (
                "bupo.internal_steps=30: the internal phase has no layer to train; "
                "set bupo.target_layer, or bupo.internal_steps=0 for GRPO"
            ),
        ),
        (
            "bupo.stages=[{layer:1,steps:2}] and bupo.target_layer=3",
            (
                "bupo.stages with bupo.target_layer=3, bupo.internal_steps=0: are two descriptions "
                "of one schedule; give bupo.stages alone, or the other two and bupo.stages=[]"
            ),
        ),
        (
            "bupo.stages=[{layer:3,steps:2},{layer:2,steps:1}]",
            (
                "bupo.stages[1]={layer: 2, steps: 1}: comes after layer 3, but stages go "
                "bottom-up; order the stages by layer"
            ),
        ),
        (
            "bupo.stages=[{layer:3}]",
            (
                "bupo.stages[0]={layer: 3, steps: 0}: layers and steps are counted from 1; "
                "give both, each at least 1"
            ),
        ),
        ("parallel.vpp=2", "parallel.vpp=2: chunks are interleaved over pipeline stages, and "),
        (
            "parallel.pp=2 and parallel.vpp=2 and megatron.deallocate_pipeline_outputs=true",
            "megatron.deallocate_pipeline_outputs=true: reports a wrong loss where parallel.vpp=2 ",
        ),
        ("parallel.sp=true", "parallel.sp=true: splits sequences over the tensor-parallel ranks"),
        (
            "evaluation.every=5",
            (
                "evaluation.every=5: there is nothing to evaluate on; "
                "set data.eval, or evaluation.every=0"
            ),
        ),
        (
            "rollout.prompts_per_step=10",
            (
                "rollout.prompts_per_step=10: does not divide into algorithm.minibatches=4; "
                "choose rollout.prompts_per_step=12"
            ),
        ),
        (
            "parallel.pp=2 and parallel.vpp=2 and megatron.overlap_p2p_comm=false",
            (
                "megatron.overlap_p2p_comm=false: two interleaved stages (parallel.pp=2) would "
                "confuse what they send each other; remove it, or set parallel.vpp=1 or "
                "parallel.pp=4"
            ),
        ),
        (
            "parallel.pp=2 and parallel.vpp=2 and megatron.batch_p2p_comm=true",
            (
                "megatron.batch_p2p_comm=true: two interleaved stages (parallel.pp=2) would "
                "confuse what they send each other; remove it, or set parallel.vpp=1 or "
                "parallel.pp=4"
            ),
        ),
        (
            "trainer.max_tokens_per_microbatch=2000",
            (
                "trainer.max_tokens_per_microbatch=2000: is less than one sequence may have: "
                "data.max_prompt_tokens=1024 + rollout.max_response_tokens=1024; "
                "choose at least 2048; parallel.cp shares a sequence's tokens among ranks"
            ),
        ),
        (
            "megatron.tensor_model_parallel_size=2",
            (
                "megatron.tensor_model_parallel_size=2: parallel.tp says the same; "
                "set parallel.tp instead"
            ),
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_a_way_out(overrides: str, message: str):
    with pytest.raises(InputError) as error:
        check(config_with(*overrides.split(" and ")), None)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.dual_clip=null",
        "algorithm.clip_low=1",
        "bupo.target_layer=3",  # with internal_steps=0: GRPO, to compare with
        "evaluation.temperature=0",
        "optimizer.lr=0",
        "bupo.stages=[{layer:2,steps:1},{layer:2,steps:1},{layer:3,steps:1}]",
    ],
)
def test_settings_at_the_edge_are_allowed(override: str):
    check(config_with(override), None)


def test_scoring_has_no_batch_to_divide():
    check(config_with("rollout.prompts_per_step=10"), None, training=False)


def test_phases_are_the_stages_or_the_hard_switch():
    assert config_with().bupo.phases() == []
    assert config_with("bupo.target_layer=6").bupo.phases() == []
    hard = config_with("bupo.target_layer=6", "bupo.internal_steps=30")
    assert hard.bupo.phases() == [(6, 30)]
    staged = config_with("bupo.stages=[{layer:2,steps:3},{layer:4,steps:5}]")
    assert staged.bupo.phases() == [(2, 3), (4, 5)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["bupo.target_layer=36"],
            (
                "bupo.target_layer=36: is the last layer of a 36-layer model, whose policy is the "
                "full policy; choose 1..35"
            ),
        ),
        (["bupo.target_layer=37"], "bupo.target_layer=37: the model has 36 layers; choose 1..35"),
        (
            ["bupo.stages=[{layer:2,steps:1},{layer:36,steps:1}]"],
            (
                "bupo.stages[1].layer=36: is the last layer of a 36-layer model, whose policy is "
                "the full policy; choose 1..35"
            ),
        ),
        (
            ["parallel.pp=5"],
            (
                "parallel.pp=5: does not divide the model's 36 layers; choose parallel.pp from "
                "1, 2, 3, 4, 6, 9, 12, 18, 36, or set megatron.num_layers_in_first_pipeline_stage "
                "and megatron.num_layers_in_last_pipeline_stage"
            ),
        ),
        (["parallel.pp=4", "parallel.vpp=2"], "parallel.pp=4, parallel.vpp=2: does not divide "),
        (
            ["parallel.pp=4", "megatron.num_layers_in_first_pipeline_stage=5"],
            "parallel.pp=4, megatron.num_layers_in_first_pipeline_stage=5: does not divide the ",
        ),
        (
            ["parallel.tp=16"],
            (
                "parallel.tp=16: does not divide the model's 8 key-value heads; choose 1 or 2 or 4 "
                "or 8"
            ),
        ),
        (["parallel.tp=3"], "parallel.tp=3: does not divide the model's 32 attention heads"),
        (
            ["data.max_prompt_tokens=40000"],
            (
                "data.max_prompt_tokens=40000, rollout.max_response_tokens=1024: together exceed "
                "the model's 40960 positions; choose rollout.max_response_tokens=960"
            ),
        ),
        (
            ["data.max_prompt_tokens=40960"],
            (
                "data.max_prompt_tokens=40960, rollout.max_response_tokens=1024: together exceed "
                "the model's 40960 positions; choose data.max_prompt_tokens < 40960"
            ),
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(overrides: list[str], message: str):
    with pytest.raises(InputError) as error:
        check_against_model(config_with(*overrides), Sizes())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["bupo.target_layer=1"],
        ["bupo.target_layer=35"],
        ["parallel.tp=8", "parallel.pp=4", "parallel.vpp=9"],
        ["parallel.pp=4", "megatron.num_layers_in_first_pipeline_stage=6"],
        ["data.max_prompt_tokens=39936"],
    ],
)
def test_settings_that_just_fit_the_model_are_allowed(overrides: list[str]):
    check_against_model(config_with(*overrides), Sizes())
