"""Do the settings fit together, and the ranks, and the model? Each rule also says the way out.

`check` needs the config alone and runs before anything heavy is imported; `check_against_model`
adds what config.json knows. Rules run in order, and the first that does not hold is the error a
user sees.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from megatron_bupo.config import algorithm_rules, probe_rules, rollout_rules, server_rules
from megatron_bupo.config.algorithm_rules import check_algorithm
from megatron_bupo.config.critic_rules import check_critic
from megatron_bupo.config.data_rules import check_data
from megatron_bupo.config.debug_rules import check_debug
from megatron_bupo.config.evaluation_rules import check_evaluation
from megatron_bupo.config.hicra_rules import check_hicra
from megatron_bupo.config.internal_layout_rules import (
    check_internal_layout,
    check_internal_layout_against_model,
)
from megatron_bupo.config.layout import Layout, parallel_sizes
from megatron_bupo.config.load import flatten
from megatron_bupo.config.native_keys import refuse_owned_keys
from megatron_bupo.config.optimizer_rules import check_optimizer, check_optimizer_against_model
from megatron_bupo.config.parallel_rules import (
    ModelSizes,
    check_parallel,
    check_parallel_against_model,
)
from megatron_bupo.config.probe_rules import check_probe, check_probe_against_model
from megatron_bupo.config.reward_rules import check_reward
from megatron_bupo.config.rollout_rules import check_rollout, check_sequences
from megatron_bupo.config.schema import AUTO, Config
from megatron_bupo.config.server_rules import check_servers
from megatron_bupo.config.timeouts import check_timeouts
from megatron_bupo.config.tracker_rules import check_trackers
from megatron_bupo.errors import InputError

__all__ = ["Layout", "check", "check_against_model", "doubts", "parallel_sizes"]

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "rollout.engine": ("embedded", "sglang"),
    "rollout.overlap_phases": ("all", "full"),
    "data.contamination": ("warn", "drop", "refuse"),
    "data.bad_rows": ("refuse", "skip"),
    "sync.mode": ("broadcast", "http", "disk", "ipc"),
    "sync.pause": ("retract", "in_place", "abort"),
    "algorithm.rollout_correction": ("auto", "tis", "tis_full", "none"),
    "algorithm.advantage": (
        "grpo",
        "dr_grpo",
        "rloo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "gae",
    ),
    "algorithm.loss": ("clipped", "gspo", "cispo", "unclipped"),
    "algorithm.loss_aggregation": ("auto", "token_mean", "sequence_mean", "constant_length"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "algorithm.kl_in": ("loss", "reward"),
    "hicra.mask": ("grams", "placebo", "entropy"),
    "hicra.form": ("paper", "amplify"),
    "hicra.phases": ("full", "internal", "both"),
    "bupo.optimizer_at_switch": ("per_layer_step", "common_step", "reset", "warmup"),
    "optimizer.decay": ("constant", "linear", "cosine"),
    "critic.optimizer.decay": ("constant", "linear", "cosine"),
}

ALSO_CALLED = {"ppo": "gae"}  # a choice by another name than ours

# (what a number must be, test, keys); a null passes where the schema allows it
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        """steps data.max_prompt_tokens rollout.prompts_per_step rollout.responses_per_prompt
        rollout.max_response_tokens rollout.batch_size algorithm.minibatches bupo.target_layer
        rollout.step_budget_tokens servers.count servers.attempts sync.bucket_bytes
        bupo.auto_prompts bupo.switch_warmup_steps optimizer.max_skipped_updates
        critic.minibatches critic.optimizer.max_skipped_updates
        parallel.tp parallel.pp parallel.vpp parallel.dp parallel.cp parallel.ep parallel.etp
        trainer.microbatch_size trainer.max_tokens_per_microbatch trainer.logprob_chunk_tokens
        checkpoint.every checkpoint.keep
        evaluation.responses_per_prompt evaluation.max_prompts evaluation.max_response_tokens
        evaluation.responses_per_batch evaluation.bootstrap_samples
        reward.memory_mb reward.processes
        probe.prompts probe.max_response_tokens probe.layer bupo.guard.patience""",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        """seed algorithm.kl_coefficient algorithm.entropy_coefficient bupo.internal_steps
        optimizer.lr optimizer.min_lr optimizer.warmup_steps optimizer.weight_decay
        critic.warmup_steps critic.optimizer.lr critic.optimizer.min_lr
        critic.optimizer.warmup_steps critic.optimizer.weight_decay
        evaluation.every evaluation.temperature rollout.temperature logging.stall_s
        rollout.max_staleness rollout.dynamic_sampling_rounds servers.restarts
        debug.mismatch_every probe.every""",
    ),
    (
        "greater than 0",
        lambda x: x > 0,
        """reward.timeout_s algorithm.clip_high algorithm.tis_cap
        optimizer.eps optimizer.clip_grad critic.clip_range critic.optimizer.eps
        critic.optimizer.clip_grad rollout.step_budget_s servers.start_timeout_s
        servers.request_timeout_s servers.batch_timeout_s servers.health_every_s sync.timeout_s
        bupo.guard.kl_increase_nats bupo.guard.entropy_increase_nats
        bupo.guard.repetition_increase""",
    ),
    (
        "greater than 0 and at most 1",
        lambda x: 0 < x <= 1,
        "rollout.top_p evaluation.top_p algorithm.clip_low",
    ),
    ("between 0 and 1, both excluded", lambda x: 0 < x < 1, "evaluation.confidence"),
    ("greater than 0 and at most 1", lambda x: 0 < x <= 1, "hicra.entropy_share"),
    ("at least 0", lambda x: x >= 0, "hicra.alpha hicra.from_step"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "algorithm.gamma algorithm.gae_lambda"),
    ("greater than 1, or null for no dual clip", lambda x: x > 1, "algorithm.dual_clip"),
    (
        "greater than 1, or null for no bound",
        lambda x: x > 1,
        "bupo.guard.perplexity_ratio bupo.guard.response_tokens_ratio",
    ),
)


def check(
    config: Config, world_size: int | None, *, training: bool = True, here: bool = True
) -> Layout:
    """All rules that need no files; the layout over `world_size` ranks (None: no torchrun). Not
    `here`: the run is another machine's.
    """
    _choices_are_known(config)
    _numbers_are_in_range(config)
    check_optimizer(config)
    _schedule_is_one_of_two_kinds(config)
    _stages_go_bottom_up(config)
    check_critic(config)
    check_hicra(config)
    check_parallel(config)
    check_timeouts(config)
    check_reward(config.reward)
    check_evaluation(config)
    check_data(config, training=training)
    check_debug(config)
    check_trackers(config)
    refuse_owned_keys(config.megatron)
    layout = parallel_sizes(config, world_size)
    if training:
        _responses_are_drawn(config)
        check_algorithm(config)
        check_rollout(config)
        check_internal_layout(config, layout.world)
        check_probe(config)
        _minibatches_divide(config)
        _a_microbatch_holds_any_sequence(config)
        check_servers(config, layout.world, here=here)
    return layout


def doubts(config: Config) -> list[str]:
    """What holds, but may not do what it seems to: for the person who starts the run."""
    return [
        told
        for rules in (algorithm_rules, rollout_rules, probe_rules, server_rules)
        for told in rules.doubts(config)
    ]


def check_against_model(config: Config, model: ModelSizes, *, training: bool = True) -> None:
    """The rules that need the model's sizes; scoring (not `training`) samples no responses."""
    _layers_are_internal(config, model.layers)
    check_parallel_against_model(config, model)
    check_optimizer_against_model(config, model)
    if training:
        check_internal_layout_against_model(config, model)
        check_probe_against_model(config, model.layers)
        check_sequences(config, model)


def _choices_are_known(config: Config) -> None:
    values = flatten(config)
    for key, choices in CHOICES.items():
        value = str(values[key])
        if value not in choices:
            meant = ALSO_CALLED.get(value.lower(), value.lower())
            near = difflib.get_close_matches(meant, choices, n=1, cutoff=0)[0]
            raise InputError(
                f"{key}={value}",
                f"is not one of {', '.join(choices)}",
                f"the nearest is {near}",
            )


def _numbers_are_in_range(config: Config) -> None:
    values = flatten(config)
    layer = config.bupo.target_layer
    if isinstance(layer, str) and layer != AUTO:
        way_out = f"give its number, counted from 1, or {AUTO}"
        raise InputError(f"bupo.target_layer={layer}", "is no layer", way_out)
    for expected, holds, keys in RANGES:
        for key in keys.split():
            value = values[key]
            if value is None or (key, value) == ("bupo.target_layer", AUTO):
                continue
            assert isinstance(value, int | float)
            if not (holds(value) and math.isfinite(value)):
                raise InputError(f"{key}={value}", "is out of range", f"must be {expected}")


def _responses_are_drawn(config: Config) -> None:
    if config.rollout.temperature == 0:
        raise InputError(
            "rollout.temperature=0.0",
            "all responses to a prompt would be the same one, and the ratio has no temperature",
            "choose more than 0; evaluation.temperature=0 evaluates greedily",
        )


def _schedule_is_one_of_two_kinds(config: Config) -> None:
    bupo = config.bupo
    if bupo.stages and (bupo.target_layer is not None or bupo.internal_steps):
        raise InputError(
            f"bupo.stages with bupo.target_layer={bupo.target_layer}, "
            f"bupo.internal_steps={bupo.internal_steps}",
            "are two descriptions of one schedule",
            "give bupo.stages alone, or the other two and bupo.stages=[]",
        )
    if bupo.internal_steps and not bupo.stages and bupo.target_layer is None:
        raise InputError(
            f"bupo.internal_steps={bupo.internal_steps}",
            "the internal phase has no layer to train",
            "set bupo.target_layer, or bupo.internal_steps=0 for GRPO",
        )


def _stages_go_bottom_up(config: Config) -> None:
    below = 0
    for i, stage in enumerate(config.bupo.stages):
        if stage.layer < 1 or stage.steps < 1:
            raise InputError(
                f"bupo.stages[{i}]={{layer: {stage.layer}, steps: {stage.steps}}}",
                "layers and steps are counted from 1",
                "give both, each at least 1",
            )
        if stage.layer < below:
            raise InputError(
                f"bupo.stages[{i}]={{layer: {stage.layer}, steps: {stage.steps}}}",
                f"comes after layer {below}, but stages go bottom-up",
                "order the stages by layer",
            )
        below = stage.layer


def _minibatches_divide(config: Config) -> None:
    """A step's prompts split evenly into minibatches; ranks and micro-batches take any number."""
    prompts, minibatches = config.rollout.prompts_per_step, config.algorithm.minibatches
    if prompts % minibatches:
        raise InputError(
            f"rollout.prompts_per_step={prompts}",
            f"does not divide into algorithm.minibatches={minibatches}",
            f"choose rollout.prompts_per_step={-(-prompts // minibatches) * minibatches}",
        )


def _a_microbatch_holds_any_sequence(config: Config) -> None:
    budget = config.trainer.max_tokens_per_microbatch
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > budget:
        raise InputError(
            f"trainer.max_tokens_per_microbatch={budget}",
            f"is less than one sequence may have: data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} + rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens}",
            f"choose at least {longest}; parallel.cp shares a sequence's tokens among ranks",
        )


def _layers_are_internal(config: Config, layers: int) -> None:
    named = [(f"bupo.stages[{i}].layer", s.layer) for i, s in enumerate(config.bupo.stages)]
    if isinstance(config.bupo.target_layer, int):
        named.append(("bupo.target_layer", config.bupo.target_layer))
    for key, layer in named:
        if 1 <= layer < layers:
            continue
        reason = f"the model has {layers} layers"
        if layer == layers:
            reason = f"is the last layer of a {layers}-layer model, whose policy is the full policy"
        raise InputError(f"{key}={layer}", reason, f"choose 1..{layers - 1}")
