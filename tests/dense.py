"""The reference for all that the actor computes: transformers on one process, whole logits, loops.

Nothing here is fast, sharded, chunked or cached, and nothing is shared with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import InternalLayerPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import TokenBatch


def dense_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint at `path` as transformers computes it, attention without fused kernels."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def by_hf_name(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A model's parameters, or their gradients, under the names they have on disk, where each
    expert has its own; transformers 5 stacks them in memory.
    """
    named = {}
    for name, tensor in tensors:
        block, experts, stacked = name.partition(".experts.")
        if not experts:
            named[name] = tensor
        for e, of_one in enumerate(tensor if experts else ()):
            projections = ["gate_proj", "up_proj"] if stacked == "gate_up_proj" else [stacked]
            for projection, part in zip(projections, of_one.chunk(len(projections)), strict=True):
                named[f"{block}.experts.{e}.{projection}.weight"] = part
    return named


def dense_logits(model: Any, input_ids: Tensor, policy: Policy) -> Tensor:
    """`[responses, tokens, vocab]`; entry t is the distribution of token t + 1."""
    if not isinstance(policy, InternalLayerPolicy):
        return model(input_ids).logits
    hidden = model(input_ids, output_hidden_states=True).hidden_states[policy.layer]
    return model.lm_head(model.model.norm(hidden) if policy.read_out_norm else hidden)


def dense_logprobs(
    model: Any, batch: TokenBatch, policy: Policy, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of response tokens, `[responses, tokens]` fp32 nats, else 0."""
    logits = dense_logits(model, batch.input_ids, policy).float() / temperature
    log_p = torch.log_softmax(logits, dim=-1)[:, :-1]
    chosen = log_p.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    first = torch.zeros(len(batch), 1)  # nothing comes before token 0
    mask = batch.response_mask
    return (
        torch.cat((first, chosen), dim=1) * mask,
        torch.cat((first, entropies), dim=1) * mask,
    )


def loop_loss(
    logprobs: Tensor,
    entropies: Tensor,
    batch: TokenBatch,
    *,
    aggregation: str,
    kind: str = "clipped",
    longest: int = 0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
    tis_cap: float | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """The loss, one response and one token at a time; `tis_cap`: each token weighs what it is
    likelier for the learner than for the sampler. `longest` is for constant_length.
    """
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    learns = batch.response_mask if batch.learns is None else batch.learns
    per_response = []
    for i in range(len(batch)):
        losses = []
        tokens = [t for t in range(batch.input_ids.shape[1]) if learns[i, t]]
        log_ratios = [logprobs[i, t] - batch.old_logprobs[i, t] for t in tokens]
        for t, log_ratio in zip(tokens, log_ratios, strict=True):
            ratio, advantage = torch.exp(log_ratio), float(batch.advantages[i, t])
            if kind == "gspo":
                alike = len(set(batch.advantages[i, tokens].tolist())) == 1
                ratio = _gspo_ratio(log_ratios, None if alike else log_ratio)
            gain = ratio * advantage
            if kind == "cispo":
                weight = min(max(float(ratio.detach()), 1 - clip_low), 1 + clip_high)
                gain = weight * advantage * logprobs[i, t]
            if kind in {"clipped", "gspo"}:
                if advantage > 0 and ratio > 1 + clip_high:
                    gain = torch.tensor((1 + clip_high) * advantage)
                if advantage < 0 and ratio < 1 - clip_low:
                    gain = torch.tensor((1 - clip_low) * advantage)
                if dual_clip is not None and advantage < 0 and ratio > dual_clip:
                    gain = torch.tensor(dual_clip * advantage)
            weight = 1.0
            if tis_cap is not None:
                log_weight = float(batch.old_logprobs[i, t]) - float(batch.rollout_logprobs[i, t])
                weight = min(math.exp(log_weight), tis_cap)
            losses.append(-gain * weight - entropy_coefficient * entropies[i, t])
        per_response.append(losses)
    total = torch.stack([x for losses in per_response for x in losses]).sum()
    if aggregation == "token_mean":
        return total / sum(len(losses) for losses in per_response)
    if aggregation == "constant_length":
        return total / (len(batch) * longest)
    means = [torch.stack(losses).sum() / len(losses) for losses in per_response if losses]
    return torch.stack(means).sum() / len(batch)


def _gspo_ratio(log_ratios: list[Tensor], own: Tensor | None) -> Tensor:
    """A response's ratio (arXiv 2507.18071, Eq 7), or with the slope of a token's `own` (Eq 14)."""
    ratio = torch.exp(torch.stack(log_ratios).mean())
    return ratio if own is None else ratio.detach() * torch.exp(own - own.detach())


@dataclass(frozen=True)
class DenseUpdate:
    """What one update on a batch should report, and its gradients by HF name."""

    logprobs: Tensor
    entropies: Tensor
    loss: float
    grad_norm: float
    grads: dict[str, Tensor]  # zeros where the policy does not reach


def dense_update(
    model: Any, batch: TokenBatch, policy: Policy, *, aggregation: str = "token_mean", **knobs: Any
) -> DenseUpdate:
    """Forward and backward of `batch` (with its old log-probs) under `policy`; `knobs` are those of
    `loop_loss`.
    """
    model.zero_grad()
    logprobs, entropies = dense_logprobs(model, batch, policy)
    loss = loop_loss(logprobs, entropies, batch, aggregation=aggregation, **knobs)
    loss.backward()
    grads = by_hf_name(
        (name, torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    )
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    return DenseUpdate(logprobs.detach(), entropies.detach(), loss.item(), norm, grads)
