"""The shim for machines without CUDA does nothing where CUDA exists, and no harm elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from megatron_bupo.mcore import cpu
from tests.dense import dense_model
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _names() -> dict[str, Any]:
    """What a shim could touch, by name: torch and Megatron, and the environment."""
    import megatron.core.tensor_parallel.random  # noqa: F401

    modules = [m for name, m in sys.modules.items() if name.startswith(("torch", "megatron.core"))]
    found = {f"{m.__name__}.{key}": value for m in modules for key, value in vars(m).items()}
    found |= {f"Tensor.{key}": value for key, value in vars(torch.Tensor).items()}
    return found | {f"environment {key}": sys.intern(value) for key, value in os.environ.items()}


def _changes(has_cuda: bool) -> list[str]:
    """Names that `install` exchanges or adds on a machine that has CUDA or not."""
    torch.cuda.is_available = lambda: has_cuda
    before = _names()
    cpu.install()
    return [name for name, value in _names().items() if before.get(name, _names) is not value]


def test_nothing_is_touched_where_cuda_exists():
    assert run_ranks(1, _changes, True) == [[]]
    [changed] = run_ranks(1, _changes, False)
    assert {"torch.zeros", "torch.cuda.current_device", "Tensor.cuda"} <= set(changed)


def _on_the_cpu() -> dict[str, Any]:
    cpu.install()
    cpu.install()  # twice is once
    leaf = torch.zeros(2, device="cuda", pin_memory=True, requires_grad=True)
    torch.cuda.manual_seed(3)
    first = torch.rand(2, device=torch.device("cuda", 0))
    torch.cuda.manual_seed(3)
    return {
        "devices": [
            leaf.device.type,
            first.device.type,
            torch.ones(1).cuda().device.type,
            torch.ones(1).to("cuda").device.type,
            torch.ones(1).to(device="cuda", dtype=torch.bfloat16).device.type,
            torch.empty(1, device="meta").device.type,
            cpu.device().type,
        ],
        "dtype": torch.ones(1).to("cuda", torch.bfloat16).dtype,
        "leaf": leaf.requires_grad,
        "type": torch.ones(1).type(),
        "same draws": torch.equal(first, torch.rand(2)),
        "on meta": _made_under_meta(),
        "compiled": _compiled_by_megatron(),
    }


def _compiled_by_megatron() -> int:
    """Functions that torch.compile works on when Megatron calls one that it fuses: half a minute
    each.
    """
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    get_torch_obj_rule_map.cache_clear()
    get_torch_obj_rule_map()  # raises where one function stands under two names
    swiglu(torch.ones(2, 4))
    return torch._dynamo.utils.counters["frames"]["total"]


def _made_under_meta() -> str:
    with torch.device("meta"):
        return torch.arange(3).device.type


def test_cuda_means_the_cpu_and_all_else_means_what_it_did():
    [seen] = run_ranks(1, _on_the_cpu)
    assert seen == {
        "devices": ["cpu"] * 5 + ["meta", "cpu"],
        "dtype": torch.bfloat16,
        "leaf": True,
        "type": "torch.FloatTensor",  # only Megatron is told of CUDA
        "same draws": True,
        "on meta": "meta",
        "compiled": 0,
    }


def _logits(model_dir: Path) -> torch.Tensor:
    cpu.install()
    return dense_model(model_dir)(torch.arange(20)[None]).logits.detach()


def test_transformers_loads_and_computes_the_same_model_afterwards(
    tiny_model_dir: Callable[..., Path],
):
    """It builds models under `torch.device("meta")`, which knows torch's factories by identity."""
    model_dir = tiny_model_dir(family="qwen3")
    before = dense_model(model_dir)(torch.arange(20)[None]).logits
    assert run_ranks(1, _logits, model_dir)[0].equal(before)
