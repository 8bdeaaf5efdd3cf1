"""BuPO on a model that Megatron-Bridge builds from a Hugging Face checkpoint, in one's own loop.

    torchrun --nproc-per-node 4 examples/megatron_bridge_bupo.py MODEL_DIR

The two lines are those with `controller`; the loop is that of `policy_gradient.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from examples import policy_gradient
from megatron_bupo.pipelines import PhaseController, PhaseSchedule
from megatron_bupo.pipelines.megatron_bridge import follow


def build(
    model_dir: str, schedule: PhaseSchedule, sharing: dict[str, Any] | None = None, **settings: Any
) -> tuple[list[Any], PhaseController]:
    """This rank's chunks, in DDP where `sharing` says how, and what they follow."""
    provider: Any = AutoBridge.from_hf_pretrained(model_dir).to_megatron_provider()
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    controller = follow(provider, schedule)
    ddp = None if sharing is None else DistributedDataParallelConfig(**sharing)
    chunks = provider.provide_distributed_model(
        ddp_config=ddp, wrap_with_ddp=ddp is not None, bf16=provider.bf16, fp16=False
    )
    return chunks, controller


def main(model_dir: str) -> None:
    """Four steps on made-up responses, two of them of layer 6."""
    policy_gradient.start(tp=2, pp=2)
    chunks, controller = build(
        model_dir,
        PhaseSchedule.of([(6, 2)]),
        {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True},
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
        calculate_per_token_loss=True,
    )
    config: Any = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    rates = {"optimizer": "adam", "lr": 1e-6, "weight_decay": 0.01, "clip_grad": 1.0}
    types: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}
    settings = OptimizerConfig(use_distributed_optimizer=True, **rates, **types)
    optimizer = get_megatron_optimizer(settings, chunks)
    for step in range(4):
        controller.set_step(step)
        torch.manual_seed(step)  # where a sampler and a reward would stand
        ids = torch.randint(0, 1000, (4, 64), device=policy_gradient.DEVICE)
        advantages = torch.randn(4, 1, device=ids.device).expand(4, 64)
        batch = {"input_ids": ids, "advantages": advantages, "mask": torch.ones_like(advantages)}
        policy_gradient.train(chunks, optimizer, [batch])
        print(f"step {step}: {controller.policy}")


if __name__ == "__main__":
    main(*sys.argv[1:])
