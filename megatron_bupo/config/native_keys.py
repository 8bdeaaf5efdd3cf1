"""Which of Megatron-Core's own names `megatron.*` may not set, and what to set instead.

Everything else passes through. A name stands here because one of our keys says the same thing,
because the checkpoint decides it, or because it cannot work with a depth that changes between
phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bupo.config.layout import FIRST_STAGE_LAYERS, LAST_STAGE_LAYERS
from megatron_bupo.errors import InputError

_OURS = {
    "parallel.tp": "tensor_model_parallel_size",
    "parallel.pp": "pipeline_model_parallel_size",
    "parallel.vpp": "virtual_pipeline_model_parallel_size",
    "parallel.sp": "sequence_parallel",
    "parallel.cp": "context_parallel_size",
    "parallel.ep": "expert_model_parallel_size",
    "parallel.etp": "expert_tensor_parallel_size",
    "parallel.distributed_optimizer": "use_distributed_optimizer",
    "optimizer.lr": "lr",
    "optimizer.min_lr": "min_lr",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.clip_grad": "clip_grad",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.eps": "adam_eps",
    "model.dtype": "bf16 fp16 params_dtype pipeline_dtype",
}
_CHECKPOINT = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "add_bias_linear add_qkv_bias gated_linear_unit activation_func normalization "
    "layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm rotary_interleaved "
    "num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax "
    "moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups "
    "moe_router_group_topk moe_router_topk_limited_devices moe_router_enable_expert_bias "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size "
    "moe_apply_probs_on_input"
)
_UNSUPPORTED = {
    "enable_cuda_graph external_cuda_graph cuda_graph_impl optimizer_cuda_graph": (
        "captured graphs cannot follow the change of depth between phases",
        "remove it",
    ),
    "mtp_num_layers": (
        "multi-token-prediction heads read the last layer, which the internal phase does not run",
        "remove it",
    ),
    "optimizer": ("only AdamW is offered", "remove it"),
    "decoupled_lr decoupled_min_lr": (
        "optimizer.lr_factors gives parts of the model rates of their own",
        "remove it",
    ),
    "grad_norm_skip_threshold": ("only updates that are not finite are skipped", "remove it"),
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_dropping "
    "moe_token_drop_policy moe_expert_rank_capacity_factor": (
        "an expert that drops tokens makes a response's log-prob depend on its micro-batch",
        "remove it: no token is dropped",
    ),
    "moe_input_jitter_eps moe_router_force_load_balancing moe_router_force_biased": (
        "a ratio would compare two random routings of one response",
        "remove it",
    ),
    "moe_z_loss_coeff": (
        "its share of a minibatch would depend on the number of micro-batches",
        "remove it",
    ),
    "overlap_moe_expert_parallel_comm": (
        "its schedule calls parts of layers, and would not stop at the target",
        "remove it",
    ),
    "pipeline_model_parallel_layout": (
        "this way of dealing out layers is not offered",
        f"use megatron.{FIRST_STAGE_LAYERS} and megatron.{LAST_STAGE_LAYERS}",
    ),
    "overlap_param_gather_with_optimizer_step": (
        "the optimizer steps all chunks at once, after their common gradient norm",
        "use megatron.overlap_param_gather",
    ),
    "num_distributed_optimizer_instances": (
        "optimizer states are sharded over all data-parallel ranks",
        "remove it",
    ),
    "num_buckets": ("Megatron-Core does not read it", "use megatron.bucket_size"),
    "use_megatron_fsdp use_custom_fsdp use_precision_aware_optimizer optimizer_cpu_offload": (
        "not shown to leave frozen layers as they are",
        "remove it",
    ),
    "calculate_per_token_loss": (
        "losses are always divided by the global token count",
        "use algorithm.loss_aggregation",
    ),
}

_REASONS: dict[str, tuple[str, str]] = {
    **{
        name: (f"{ours} says the same", f"set {ours} instead")
        for ours, names in _OURS.items()
        for name in names.split()
    },
    **dict.fromkeys(
        _CHECKPOINT.split(),
        ("the checkpoint's config.json decides it", "choose another model.path"),
    ),
    **{name: why for names, why in _UNSUPPORTED.items() for name in names.split()},
}


def refuse_owned_keys(passed: Mapping[str, Any]) -> None:
    """The `megatron.*` keys of a run are Megatron's to know and not ours."""
    for name, value in passed.items():
        if name in _REASONS:
            reason, way_out = _REASONS[name]
            raise InputError(f"megatron.{name}={value}", reason, way_out)
