"""The models and layouts of the parity matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.tiny_models import LLAMA3_ROPE

# Weights at which log-probs lie within 8 nats and gradients near 0.2: what fp32 can be held to.
_COMMON = {"vocab": 67, "scale": 0.12}
QWEN2 = _COMMON | {"family": "qwen2"}
QWEN3 = _COMMON | {"family": "qwen3", "head_dim": 12}
LLAMA = _COMMON | {
    "family": "llama",
    "rope": LLAMA3_ROPE,  # of 8 frequencies one is kept, one blended, the others are divided
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
}
MOE = _COMMON | {"family": "qwen3_moe", "head_dim": 12, "num_experts": 6}
SPARSE = {"mlp_only_layers": [1, 3], "norm_topk_prob": False}
TIED = {"tied": True}
DIST: dict[str, Any] = {"distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = "bfloat16"
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Case:
    """A model under a layout."""

    name: str
    model: dict[str, Any]
    ranks: int
    layout: dict[str, Any]
    megatron: dict[str, Any]
    dtype: str
    fast: bool  # is it in the fast tier?
    common: bool  # in `make test`? What is fast is too

    @property
    def wide(self) -> bool:
        """Is it left to `make test-wide`? What it adds is another mixture of what others have."""
        return not (self.fast or self.common)


def _case(
    name: str,
    model: dict[str, Any],
    /,
    ranks: int = 1,
    *,
    megatron: dict[str, Any] | None = None,
    dtype: str = "float32",
    fast: bool = False,
    common: bool = False,
    **layout: Any,
) -> Case:
    if layout.get("pp", 1) == 1 and "mlp_only_layers" not in model:
        model = {"layers": 3} | model  # the first, one inside, the last: no stage to begin or end
    return Case(name, model, ranks, layout, megatron or {}, dtype, fast, common)


CASES = [
    _case("one rank, qwen3", QWEN3, fast=True),
    _case("TP2, llama", LLAMA, 2, tp=2, fast=True),
    _case("PP2, qwen2 tied", QWEN2 | TIED, 2, pp=2, fast=True),
    _case("TP2 PP2 SP, qwen3 tied", QWEN3 | TIED, 4, tp=2, pp=2, sp=True, fast=True),
    _case("VPP2 PP2, qwen3", QWEN3, 2, pp=2, vpp=2, fast=True),
    _case("DP2 distributed optimizer, qwen2", QWEN2, 2, dp=2, **DIST, fast=True),
    _case("one rank, qwen2 tied", QWEN2 | TIED),
    _case("one rank, llama with all biases", LLAMA | {"bias": True}),
    _case("TP2, qwen2 tied", QWEN2 | TIED, 2, tp=2),
    _case("TP2 SP, llama with all biases", LLAMA | {"bias": True}, 2, tp=2, sp=True, common=True),
    _case("TP2 SP, qwen3 tied", QWEN3 | TIED, 2, tp=2, sp=True),
    _case("TP4, llama", LLAMA, 4, tp=4),
    _case("TP4 SP, llama", LLAMA, 4, tp=4, sp=True),
    _case("PP2, llama", LLAMA, 2, pp=2),
    _case("PP4, qwen3", QWEN3, 4, pp=4),
    _case("PP4, qwen2 tied", QWEN2 | TIED, 4, pp=4),
    _case("TP2 PP2, qwen2", QWEN2, 4, tp=2, pp=2),
    _case("TP2 PP2, llama tied, even vocabulary", LLAMA | TIED | {"vocab": 64}, 4, tp=2, pp=2),
    _case("TP2 PP2 SP, qwen2", QWEN2, 4, tp=2, pp=2, sp=True),
    _case("VPP2 PP2, qwen2 tied", QWEN2 | TIED, 2, pp=2, vpp=2, common=True),
    _case("VPP2 PP2 TP2 SP, qwen3", QWEN3, 4, tp=2, pp=2, vpp=2, sp=True),
    _case("VPP2 PP4, qwen3", QWEN3 | {"layers": 8}, 4, pp=4, vpp=2),
    _case("VPP2 PP4, llama tied", LLAMA | TIED | {"layers": 8}, 4, pp=4, vpp=2),
    _case("DP2, qwen3 tied", QWEN3 | TIED, 2, dp=2),
    _case("TP2 DP2 distributed optimizer, qwen3", QWEN3, 4, tp=2, dp=2, **DIST, common=True),
    _case(
        "PP2 DP2 distributed optimizer, qwen2 tied",
        QWEN2 | TIED,
        4,
        pp=2,
        dp=2,
        **DIST,
    ),
    _case("CP2, qwen3", QWEN3, 2, cp=2, fast=True),
    _case("CP2 TP2 SP, qwen2 tied", QWEN2 | TIED, 4, cp=2, tp=2, sp=True),
    _case("CP2 PP2, llama", LLAMA, 4, cp=2, pp=2),
    _case("CP4, qwen3 tied", QWEN3 | TIED, 4, cp=4),
    _case("CP2 DP2 distributed optimizer, qwen3", QWEN3, 4, cp=2, dp=2, **DIST),
    _case("CP2 PP2 VPP2 TP2 SP, qwen3", QWEN3, 8, cp=2, pp=2, vpp=2, tp=2, sp=True),
    _case("recompute, PP2, qwen3 tied", QWEN3 | TIED, 2, pp=2, megatron=RECOMPUTE, common=True),
    _case(
        "recompute, TP2 PP2 SP, outputs freed, llama",
        LLAMA,
        4,
        tp=2,
        pp=2,
        sp=True,
        megatron=RECOMPUTE | {"deallocate_pipeline_outputs": True},
    ),
    _case(
        "1 + 3 layers, PP2, qwen3",
        QWEN3,
        2,
        pp=2,
        megatron={"num_layers_in_first_pipeline_stage": 1},
    ),
    _case(
        "overlapped, PP2 DP2 distributed optimizer, qwen3 tied",
        QWEN3 | TIED,
        4,
        pp=2,
        dp=2,
        megatron=OVERLAP,
        **DIST,
        common=True,
    ),
    _case(
        "embedding and unembedding counted, PP3, qwen2",
        QWEN2,
        3,
        pp=3,
        megatron={
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
        common=True,
    ),
    _case(
        "1 + 2 + 1 layers, PP3, qwen2 tied",
        QWEN2 | TIED,
        3,
        pp=3,
        megatron={"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
        common=True,
    ),
    _case(
        "TP2 PP2 DP2 distributed optimizer, qwen3 tied", QWEN3 | TIED, 8, tp=2, pp=2, dp=2, **DIST
    ),
    _case("TP2 PP2 CP2 SP, llama", LLAMA, 8, tp=2, pp=2, cp=2, sp=True),
    _case("PP4 DP2, qwen2", QWEN2, 8, pp=4, dp=2),
    _case(
        "PP2 VPP2 CP2 DP2 distributed optimizer, qwen3 tied",
        QWEN3 | TIED,
        8,
        pp=2,
        vpp=2,
        cp=2,
        dp=2,
        **DIST,
    ),
    _case(
        "core attention recomputed, TP2 CP2 SP, qwen3",
        QWEN3,
        4,
        tp=2,
        cp=2,
        sp=True,
        megatron=SELECTIVE,
    ),
    _case("one rank, qwen3_moe", MOE, fast=True),
    _case("EP2, qwen3_moe", MOE, 2, dp=2, ep=2, fast=True),
    _case("TP2 EP2 SP, qwen3_moe", MOE, 4, tp=2, dp=2, ep=2, sp=True, common=True),
    _case(
        "TP2 EP2 ETP1 SP, qwen3_moe tied, some layers dense",
        MOE | TIED | SPARSE,
        4,
        tp=2,
        dp=2,
        ep=2,
        etp=1,
        sp=True,
    ),
    _case("PP2 EP2 distributed optimizer, qwen3_moe", MOE, 4, pp=2, dp=2, ep=2, **DIST),
    _case(
        "DP4 EP2 distributed optimizer, overlapped, qwen3_moe",
        MOE,
        4,
        dp=4,
        ep=2,
        megatron={"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1},
        **DIST,
    ),
    _case("TP2 ETP1 SP, qwen3_moe", MOE, 2, tp=2, etp=1, sp=True, common=True),
    _case("PP2 VPP2 EP3, qwen3_moe", MOE, 6, pp=2, vpp=2, dp=3, ep=3),
    _case("recompute, CP2 EP2, qwen3_moe", MOE, 2, cp=2, ep=2, megatron=RECOMPUTE),
    _case("bf16, EP2, qwen3_moe", MOE, 2, dp=2, ep=2, dtype=BF16, common=True),
    _case("bf16, one rank, qwen3 tied", QWEN3 | TIED, dtype=BF16, fast=True),
    _case("bf16, TP2 PP2 SP, llama", LLAMA, 4, tp=2, pp=2, sp=True, dtype=BF16),
    _case(
        "bf16, PP2 DP2 distributed optimizer, qwen2 tied",
        QWEN2 | TIED,
        4,
        pp=2,
        dp=2,
        dtype=BF16,
        **DIST,
    ),
    _case("bf16, CP2, qwen3", QWEN3, 2, cp=2, dtype=BF16),
]
