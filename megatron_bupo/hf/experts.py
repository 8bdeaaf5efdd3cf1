"""A mixture of experts as config.json describes it: which layers have one, and who is chosen.

The router scores all experts by softmax(W x) and sends a token to the `per_token` best ones, whose
outputs are summed by these scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.hf.fields import flag, size

MOST_EXPERTS = 10_000  # more is a mistake, and would take minutes to find out


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model; its other layers have one MLP each."""

    layers: tuple[int, ...]  # that have experts, counted from 1
    number: int  # in each of these layers
    per_token: int
    ffn_size: int  # of each expert
    normalized: bool  # the scores of a token's experts are scaled to sum to 1


def read_experts(path: Path, raw: Mapping[str, Any]) -> Experts | None:
    """The experts of a Qwen3-MoE config; None where every layer has one MLP."""
    # The number has two names: transformers 4 writes num_experts, 5 num_local_experts.
    numbered = {"num_experts": raw.get("num_local_experts", raw.get("num_experts", 128))}
    dense, every = raw["mlp_only_layers"] or [], size(path, raw, "decoder_sparse_step")
    if not isinstance(dense, list):
        raise InputError(f"{path}: mlp_only_layers={dense}", "is not a list", "restore config.json")
    experts = Experts(
        layers=tuple(
            layer
            for layer in range(1, size(path, raw, "num_hidden_layers") + 1)
            if layer % every == 0 and layer - 1 not in dense
        ),
        number=size(path, numbered, "num_experts", at_most=MOST_EXPERTS),
        per_token=size(path, raw, "num_experts_per_tok"),
        ffn_size=size(path, raw, "moe_intermediate_size"),
        normalized=flag(path, raw, "norm_topk_prob"),
    )
    _check_routing(path, experts)
    return experts if experts.layers else None


def _check_routing(path: Path, experts: Experts) -> None:
    if experts.per_token > experts.number:
        raise InputError(
            f"{path}: num_experts_per_tok={experts.per_token}",
            f"is more than the {experts.number} experts",
            "restore config.json",
        )
    if experts.normalized and experts.per_token == 1:
        raise InputError(
            f"{path}: num_experts_per_tok=1, norm_topk_prob=true",
            "a single score scaled to sum to 1 is always 1, and the router learns nothing",
            "use a checkpoint with more experts per token, or with norm_topk_prob=false",
        )
