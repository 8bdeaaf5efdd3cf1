#!/usr/bin/env bash
# BuPO in verl (0.9 or later, Megatron engine): any of its Megatron run scripts, with a phase.
#
#     examples/verl_bupo.sh examples/grpo_trainer/run_qwen3_8b_megatron.sh [overrides ...]
#
# from verl's folder, with megatron_bupo importable on every node (PYTHONPATH, or installed).
# It works with main_ppo, old and V1 (sync, colocate_async, separate_async): they compute old
# log-probs by the engine and move the learning-rate scheduler once a step. Refused in the internal
# phase are other strategies than megatron, fully_async_policy, which insists on the sampler's
# log-probs, and SFT. Tinker's worker does not move the scheduler: it would not leave the phase.
# BUPO_TARGET_LAYER counts from 1; BUPO_INTERNAL_STEPS is how many of verl's steps train it.
set -euo pipefail
export VERL_USE_EXTERNAL_MODULES=megatron_bupo.pipelines.verl
export BUPO_TARGET_LAYER=${BUPO_TARGET_LAYER:-6} BUPO_INTERNAL_STEPS=${BUPO_INTERNAL_STEPS:-30}

run_script=$1
shift
workers=+ray_kwargs.ray_init.runtime_env.env_vars # of the nodes that this shell does not reach
bash "$run_script" \
    "$workers.VERL_USE_EXTERNAL_MODULES=$VERL_USE_EXTERNAL_MODULES" \
    "$workers.BUPO_TARGET_LAYER='$BUPO_TARGET_LAYER'" \
    "$workers.BUPO_INTERNAL_STEPS='$BUPO_INTERNAL_STEPS'" \
    actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler=True \
    actor_rollout_ref.rollout.calculate_log_probs=False \
    "$@"
# The first setting lets a resumed run know its step. The second keeps the sampler's log-probs, the
# full policy's, out of the internal phase: no rollout correction, no measure of mismatch.
