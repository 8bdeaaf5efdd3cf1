"""From hidden states straight to log-probs and entropies, over a vocabulary sharded by tensor
parallelism.

A row of logits costs as much as the model's widest activation, so logits exist for one chunk of
rows at a time, in the forward pass and, recomputed, in the backward pass. With T the sampling
temperature, E the unembedding and Z = sum_v exp(E_v h / T)::

    log p(y)     = E_y h / T - log Z            d log p(y) / d logits = onehot(y) - p
    H            = log Z - sum_v p_v E_v h / T  d H / d logits        = -p (log p + H)

Each rank holds the rows of E for its part of the vocabulary. Forward needs two small all-reduces a
chunk (maximum; sums); backward needs none, because log Z and H are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the logits: global ids `first .. first + valid`; the rest is
    padding.
    """

    first: int
    valid: int
    group: dist.ProcessGroup | None  # the tensor-parallel group; None: the vocabulary is whole


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """fp32 `[rows, vocab shard]`, padding at -inf."""
    logits = (hidden.to(weight.dtype) @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    if shard.valid < weight.shape[0]:
        logits[:, shard.valid :] = -torch.inf
    return logits


def _reduce(tensor: Tensor, shard: VocabShard, op: Any) -> Tensor:
    if shard.group is not None and shard.group.size() > 1:
        dist.all_reduce(tensor, op=op, group=shard.group)
    return tensor


def _chunk_statistics(
    logits: Tensor, targets: Tensor, shard: VocabShard, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, log Z and entropies of one chunk's rows, each `[rows]`; consumes `logits`."""
    local = targets - shard.first
    mine = (local >= 0) & (local < shard.valid)
    at = local.clamp(0, max(shard.valid - 1, 0)).unsqueeze(1)
    top = _reduce(logits.max(dim=1).values, shard, dist.ReduceOp.MAX)
    target_logit = torch.where(mine, logits.gather(1, at).squeeze(1) - top, 0.0)
    shifted = logits.sub_(top.unsqueeze(1))
    weights = shifted.exp()
    expected = shifted.clamp_(min=-1e30).mul_(weights).sum(1) if entropy else torch.zeros_like(top)
    sums = _reduce(torch.stack((weights.sum(1), target_logit, expected)), shard, dist.ReduceOp.SUM)
    log_z = sums[0].log()
    return sums[1] - log_z, log_z + top, log_z - sums[2] / sums[0]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _chunk_statistics(_logits(h, weight, shard, temperature), y, shard, entropy=entropy)
            for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, log_z, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, log_z, entropies)
        ctx.shard, ctx.temperature, ctx.chunk, ctx.entropy = shard, temperature, chunk, entropy
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = grads
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        hidden, weight, targets, log_z, entropies = saved
        shard: VocabShard = ctx.shard
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _logits(hidden[rows], weight, shard, ctx.temperature)
            log_p = logits.sub_(log_z[rows].unsqueeze(1))
            p = log_p.exp()
            pull = grad_logprobs[rows].unsqueeze(1)
            grad = p * -pull
            if ctx.entropy:
                surprise = log_p.clamp_(min=-1e30).add_(entropies[rows].unsqueeze(1))
                grad -= p * surprise * grad_entropies[rows].unsqueeze(1)
            local = targets[rows] - shard.first
            mine = ((local >= 0) & (local < shard.valid)).unsqueeze(1)
            at = local.clamp(0, max(shard.valid - 1, 0)).unsqueeze(1)
            grad.scatter_add_(1, at, torch.where(mine, pull, 0.0))
            grad = (grad / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = (grad @ weight).to(hidden.dtype)
            grad_weight += (grad.t() @ hidden[rows].to(weight.dtype)).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies, both fp32 nats `[rows]`.

    `hidden [rows, hidden]`, `weight [vocab shard, hidden]`, `targets [rows]` (global ids). The
    gradient of `hidden` is this rank's share: the caller sums it over the tensor-parallel group, as
    the backward of `copy_to_tensor_model_parallel_region` does. Entropies are zero without
    `with_entropy`.
    """
    if hidden.shape[0] == 0:  # keeps the graph, for pipeline stages that expect a gradient
        nothing = (hidden.sum() + weight.sum() * 0).expand(0).float()
        return nothing, nothing.detach()
    logprobs, entropies = _ChunkedLogprobs.apply(
        hidden, weight, targets, shard, temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropies if with_entropy else torch.zeros_like(entropies)
