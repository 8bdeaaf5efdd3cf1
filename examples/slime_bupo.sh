# BuPO in slime: source this file in a run script, and hand on what it sets.
#
#     source /path/to/examples/slime_bupo.sh
#     ray job submit ... -- python3 train.py ... "${BUPO_ARGS[@]}"
#
# with megatron_bupo importable on every node: its folder on the PYTHONPATH of RUNTIME_ENV_JSON.
# slime_bupo.yaml says which layer trains for how many rollouts. Until then leave out what compares
# with SGLang's log-probs, the full policy's: --use-tis, --get-mismatch-metrics,
# --use-rollout-logprobs.
BUPO_ARGS=(
    --custom-megatron-init-path megatron_bupo.pipelines.slime.check
    --custom-megatron-before-log-prob-hook-path megatron_bupo.pipelines.slime.before_log_prob
    --custom-megatron-before-train-step-hook-path megatron_bupo.pipelines.slime.before_train_step
    --custom-config-path "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slime_bupo.yaml"
)
