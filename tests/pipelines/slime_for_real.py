"""slime's own log-prob pass and train step with our hooks, on a CPU: prints what they did, as JSON.

    PYTHONPATH=.:SLIME_SOURCE:MEGATRON_LM_SOURCE python tests/pipelines/slime_for_real.py

What stands in: packages that slime only imports, its accelerator, and arguments, which are None
where it does not matter. The passes, batches and loss are slime's, the rest is Megatron-LM's.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests.pipelines.tiny_gpt import LAYERS, TOKENS, read_by_hand, tiny_gpt
from tests.ranks import run_ranks

ONLY_IMPORTED = {"ray", "sglang", "sglang_router", "wandb", "httpx", "mbridge", "slime_plugins"}
ONLY_IMPORTED |= {"torch_memory_saver", "pybase64", "ring_flash_attn", "pylatexenc"}
ROWS = [TOKENS[0], torch.tensor([2, 7, 1, 8, 2])]
HOOKS = {
    f"custom_megatron_{name}_hook_path": f"megatron_bupo.pipelines.slime.{name}"
    for name in ("before_log_prob", "before_train_step")
}


class _Names(ModuleType):
    """A module with any name in it."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None})


class _Finder:
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        known = name.partition(".")[0] in ONLY_IMPORTED
        return ModuleSpec(name, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is complete."""


class _Cpu:
    """An accelerator that does nothing but say where it is."""

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")

    current_device = device

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _Args(Namespace):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return False if name.startswith("use_") else None


ARGS = _Args(
    **HOOKS,
    num_layers=LAYERS,
    bupo_target_layer=2,
    bupo_internal_steps=1,
    start_rollout_id=0,
    get_mismatch_metrics=False,
    ci_test=False,
    enable_mtp_training=False,
    rollout_top_p=1.0,
    rollout_temperature=1.0,
    data_pad_size_multiplier=1,
    seq_length=64,
    micro_batch_size=1,
    log_probs_chunk_size=-1,
    advantage_estimator="grpo",
    eps_clip=0.2,
    eps_clip_high=0.2,
    loss_type="policy_loss",
    global_batch_size=2,
    entropy_coef=0.0,
    qkv_format="thd",
    check_for_nan_in_loss_and_grad=True,
)


def _gap(found: list[torch.Tensor], by_hand: list[dict[str, torch.Tensor]], policy: str) -> float:
    """Between slime's log-probs and those by hand; each row begins with a prompt of two tokens."""
    gaps = []
    for ours, logits, row in zip(found, by_hand, ROWS, strict=True):
        known = logits[policy][0, 1:-1].log_softmax(-1).gather(-1, row[2:, None])[:, 0]
        gaps.append(float((ours - known).abs().max()))
    return max(gaps)


def _rollout() -> dict[str, Any]:
    from slime.backends.megatron_utils import model as slime
    from slime.backends.megatron_utils.data import DataIterator
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy
    from slime.utils import accelerator

    accelerator._ACCELERATOR = _Cpu()
    slime.get_args = lambda: ARGS
    gpt: Any = tiny_gpt()
    by_hand = [read_by_hand(gpt, row[None]) for row in ROWS]
    gpt.config.finalize_model_grads_func = finalize_model_grads
    model = [DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)]
    settings = OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.1)
    optimizer = get_megatron_optimizer(settings, model)
    lengths = [len(row) - 2 for row in ROWS]
    data = {
        "tokens": ROWS,
        "total_lengths": [len(row) for row in ROWS],
        "response_lengths": lengths,
        "loss_masks": [torch.ones(n) for n in lengths],
        "rollout_mask_sums": [torch.tensor(float(n)) for n in lengths],
        "advantages": [torch.ones(lengths[0]), -torch.ones(lengths[1])],
    }

    def logprobs() -> list[torch.Tensor]:
        iterator = [DataIterator(data, [[0, 1]])]
        found = slime.forward_only(get_log_probs_and_entropy, ARGS, model, iterator, [1])
        return found["log_probs"]

    data["log_probs"] = logprobs()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    scheduler = Namespace(step=lambda increment: increment)
    iterator = [DataIterator(data, [[0, 1]])]
    losses, _ = slime.train_one_step(ARGS, 0, 0, iterator, model, optimizer, scheduler, 1, 2)
    moved = [name for name, p in gpt.named_parameters() if not torch.equal(p, before[name])]
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.copy_(before[name])
    return {
        "old": _gap(data["log_probs"], by_hand, "internal layer 2"),
        "new against old": abs(float(losses["ppo_kl"])),
        "moved": sorted({n.split(".")[2] if ".layers." in n else "ends" for n in moved}),
        "then": _gap(logprobs(), by_hand, "full"),
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    print(json.dumps(run_ranks(1, _rollout)[0]))
