"""From hidden states straight to log-probs and entropies, over a vocabulary sharded by tensor
parallelism.

A row of logits costs as much as the model's widest activation, so logits exist for one chunk of
rows at a time, in one buffer that every step works on in place: in the forward pass and, computed
again, in the backward pass. With T the sampling temperature, E the unembedding and
Z = sum_v exp(E_v h / T)::

    log p(y)     = E_y h / T - log Z            d log p(y) / d logits = onehot(y) - p
    H            = log Z - sum_v p_v E_v h / T  d H / d logits        = -p (log p + H)

Each rank holds the rows of E for its part of the vocabulary. Forward needs two small all-reduces
(the maxima; the sums beside them), backward none, because log Z and H are kept.

Products are summed and kept in fp32 whatever the weights' dtype. That holds for the gradient of E
over all chunks and micro-batches too: it is added to Megatron's fp32 gradient buffer as it arises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = -1e30  # the logit of padding: exp() is 0, and products with that are 0, not NaN
_PIECE = 2**22  # elements of what is copied beside the logits, at a time
_MIXED_GEMM = torch.__version__ >= "2.10"  # CUDA adds a product of bf16 matrices to an fp32 one


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the logits: global ids `first .. first + valid`; the rest is
    padding.
    """

    first: int
    valid: int
    group: dist.ProcessGroup | None  # the tensor-parallel group; None: the vocabulary is whole


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: int = 1, alpha: float = 1.0) -> None:
    """`out = beta * out + alpha * a @ b`, with `out` in fp32, in place."""
    if a.dtype is not torch.float32 and _needs_no_copy(a):
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


def _needs_no_copy(a: Tensor) -> bool:
    return a.dtype is torch.float32 or (a.is_cuda and _MIXED_GEMM)


def _slabs(weight: Tensor, rows: int) -> Iterator[slice]:
    """The vocabulary cut so that a slab of `rows` logits, and of `weight` if that has to be, can be
    copied.
    """
    vocab, hidden = weight.shape
    width = max(1, _PIECE // (rows if _needs_no_copy(weight) else max(rows, hidden)))
    return (slice(start, start + width) for start in range(0, vocab, width))


def write_logits(
    out: Tensor, hidden: Tensor, weight: Tensor, *, shard: VocabShard, scale: float = 1.0
) -> None:
    """Of `hidden [rows, hidden]`, times `scale`, in fp32 into `out [rows, vocab shard]`."""
    slabs = [slice(None)] if _needs_no_copy(weight) else _slabs(weight, len(hidden))
    for slab in slabs:
        _add_product(out[:, slab], hidden, weight[slab].t(), beta=0, alpha=scale)
    if shard.valid < len(weight):
        out[:, shard.valid :] = _NEVER


def _chunks(
    hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's rows and their logits, fp32 `[chunk, vocab shard]`, which the next overwrite."""
    total, chunk = len(hidden), max(1, min(chunk, len(hidden)))
    buffer = torch.empty(chunk, len(weight), dtype=torch.float32, device=hidden.device)
    for start in range(0, max(total, 1), chunk):  # a chunk of no rows where there are none
        rows = slice(start, min(start + chunk, total))
        logits = buffer[: rows.stop - start]
        write_logits(logits, hidden[rows], weight, shard=shard, scale=1 / temperature)
        yield rows, logits


def _with_exp(shifted: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of a chunk with their exp(), which the next overwrites, for work that needs both."""
    rows = min(len(shifted), max(1, _PIECE // shifted.shape[1]))
    buffer = torch.empty_like(shifted[:rows])
    for start in range(0, len(shifted), max(rows, 1)):
        s = shifted[start : start + rows]
        yield slice(start, start + rows), s, torch.exp(s, out=buffer[: len(s)])


def _sums(shifted: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor]:
    """sum_v exp(s_v), and sum_v s_v exp(s_v) or zeros, each `[chunk]`; consumes `shifted`."""
    if not entropy:
        weights = shifted.exp_().sum(1)
        return weights, torch.zeros_like(weights)
    weights, expected = shifted.new_empty(2, len(shifted))
    for rows, s, exp in _with_exp(shifted):
        weights[rows] = exp.sum(1)
        expected[rows] = s.mul_(exp).sum(1)
    return weights, expected


def _over_ranks(  # noqa: PLR0917 - the four are those of `forward`
    own: Tensor, target: Tensor, weights: Tensor, expected: Tensor, mine: Tensor, shard: VocabShard
) -> tuple[Tensor, ...]:
    """What each rank found in its part of the vocabulary, of the whole one."""
    if shard.group is None or shard.group.size() == 1 or not len(own):
        return own, target, weights, expected
    top = own.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    lower = own - top
    share = lower.exp()
    sums = torch.stack((target * mine, share * weights, share * (expected + lower * weights)))
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=shard.group)
    return top, *sums


def _times_exp(shifted: Tensor, constant: Tensor, slope: Tensor) -> Tensor:
    """exp(s) (constant + slope s) `[chunk, vocab shard]`, in place."""
    for rows, s, exp in _with_exp(shifted):
        s.mul_(slope[rows]).add_(constant[rows]).mul_(exp)
    return shifted


def _push_back(grad: Tensor, hidden: Tensor, weight: Tensor, grad_weight: Tensor | None) -> Tensor:
    """What `grad`, d loss / d logits of a chunk, gives to its hidden states, in fp32; what it gives
    to `weight` is added to `grad_weight`.
    """
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    slabs = [slice(None)] if weight.dtype is torch.float32 else _slabs(weight, len(grad))
    for slab in slabs:
        g = grad[:, slab].to(weight.dtype)
        _add_product(grad_hidden, g, weight[slab])
        if grad_weight is not None:
            _add_product(grad_weight[slab], g.t(), hidden)
    return grad_hidden


def _gradient_buffer(weight: Tensor) -> Tensor | None:
    """Megatron's buffer for the gradient of `weight`, where there is one in fp32."""
    buffer = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype is torch.float32 else None


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
        local = targets - shard.first
        at = local.clamp(0, max(shard.valid - 1, 0))
        mine, at = at == local, at.unsqueeze(1)
        # Of each row of logits z: the maximum m; the target's z; the sums of `_sums` for s = z - m.
        found = []
        for rows, logits in _chunks(hidden, weight, shard, temperature, chunk):
            top = logits.amax(1)
            target = logits.gather(1, at[rows]).squeeze(1)
            found.append((top, target, *_sums(logits.sub_(top.unsqueeze(1)), entropy=entropy)))
        whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        top, target, weights, expected = _over_ranks(*whole, mine=mine, shard=shard)
        log_weights, mean = weights.log(), expected / weights
        ctx.save_for_backward(hidden, weight, at, mine, top, weights, mean)
        ctx.shard, ctx.temperature, ctx.chunk = shard, temperature, chunk
        ctx.buffer = _gradient_buffer(weight)  # not a saved tensor: those must not change
        ctx.set_materialize_grads(False)  # what the loss leaves out costs nothing
        entropies = log_weights - mean if entropy else mean
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return target - top - log_weights, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, at, mine, top, weights, mean = ctx.saved_tensors
        pull, entropy_pull = (None if g is None else g / ctx.temperature for g in grads)
        pull = torch.zeros_like(top) if pull is None else pull
        # With p = exp(s) / W and log p + H = s - mean, the gradient of the logits is
        # exp(s) (constant + slope s), and at the target `pull` more.
        slope, constant = None, -pull / weights
        if entropy_pull is not None:
            slope = -entropy_pull / weights
            constant, slope = constant - slope * mean, slope.unsqueeze(1)
        top, constant, pull = (column.unsqueeze(1) for column in (top, constant, pull * mine))

        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            straight = ctx.buffer is not None
            grad_weight = ctx.buffer if straight else torch.zeros_like(weight, dtype=torch.float32)
        for rows, logits in _chunks(hidden, weight, ctx.shard, ctx.temperature, ctx.chunk):
            shifted = logits.sub_(top[rows])
            if slope is None:
                grad = shifted.exp_().mul_(constant[rows])
            else:
                grad = _times_exp(shifted, constant[rows], slope[rows])
            grad.scatter_add_(1, at[rows], pull[rows])
            grad_hidden[rows] = _push_back(grad, hidden[rows], weight, grad_weight)
        return grad_hidden, _handed_over(grad_weight, weight, ctx.buffer), *[None] * 5


def _handed_over(gradient: Tensor | None, weight: Tensor, buffer: Tensor | None) -> Tensor | None:
    """What autograd is told of the gradient of `weight`.

    Megatron's hook adds what arrives to its buffer, the embedding's part too where the two are
    tied, and insists that something does. For what stands in the buffer already that is a sparse
    gradient without entries: nothing to allocate, nothing to add, nothing counted twice. Megatron's
    own mark, `grad_added_to_main_grad`, would lose the embedding's part.
    """
    if gradient is not None and gradient is buffer:
        return torch.zeros_like(weight, layout=torch.sparse_coo)
    return None if gradient is None else gradient.to(weight.dtype)


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
    logprobs, entropies = _ChunkedLogprobs.apply(
        hidden.to(weight.dtype), weight, targets, shard, temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropies
