"""Which tokens would each layer have said? The most probable ones of every layer policy, at each
response token, with the probability that it gives them.

A few responses are looked at like this, not all: `top` numbers a token, layer and read-out are kept
where `residual_readings.py` keeps one. Each tensor-parallel rank finds the best of its part of the
vocabulary, and the best of those are the best of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.mcore.logprobs import VocabShard, write_logits
from megatron_bupo.mcore.residual_readings import ResidualReader
from megatron_bupo.mcore.row_reader import Kept
from megatron_bupo.types import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Lens:
    """Of the layer policies of one read-out at response tokens; the tokens of all responses lie
    end to end.
    """

    token_ids: Tensor  # [layers, tokens, top], int64, the most probable first
    probs: Tensor  # [layers, tokens, top]
    rank: Tensor  # [layers, tokens], int64, of the response token; 1: the most probable
    entropy: Tensor  # [layers, tokens], nats
    kl_to_full: Tensor  # [layers, tokens], KL(pi_l || pi), nats


class Best(NamedTuple):
    """The most probable tokens of some rows, and how the targets do among all."""

    token_ids: Tensor  # [rows, top]
    probs: Tensor  # [rows, top]
    rank: Tensor  # [rows]


class LensReader(ResidualReader):
    """A residual reader that can also say what tokens the layers would have said."""

    @torch.no_grad()
    def lens(self, batch: TokenBatch, *, top: int) -> dict[str, Lens]:
        """By read-out, `raw` and `norm` or `norm` alone, on every rank; `top` may not exceed the
        vocabulary. Float32 holds ids and ranks exactly up to 2**24.
        """
        columns = 2 * top + 3

        def read_some(kept: Kept, some: slice, out: Tensor) -> None:
            by_layer = out.unflatten(0, (self.arch.layers, self._policies, columns))
            self._lens_of(kept, some, by_layer, top)

        found = self._collect(batch, self.arch.layers * self._policies * columns, read_some)
        names = ("norm",) if self.normed else ("raw", "norm")
        by_read_out = found.unflatten(0, (self.arch.layers, self._policies, columns)).unbind(1)
        return {name: _lens(of, top) for name, of in zip(names, by_read_out, strict=True)}

    def _lens_of(self, kept: Kept, some: slice, out: Tensor, top: int) -> None:
        """Of this stage's layers at the rows `some`, into `[layers, policies, columns, rows]`."""
        assert kept.final is not None, "every stage has it"
        targets = kept.microbatch.targets[some]
        full = self._outs.yardstick(self._together(kept, kept.final, some), targets)
        for layer, stream, attention, ffn in self._path(kept, some):
            after = stream + attention + ffn
            normed = self._rms_norm(after, self._final_norm)
            vectors = torch.stack([normed] if self.normed else [after, normed])
            entropy, kl, _, _ = self._outs.whole(
                self._outs.read(vectors, full, compared=len(vectors)), full
            )
            for i, vector in enumerate(vectors):
                best = self._best(vector, targets, top)
                singles = torch.stack((best.rank.float(), entropy[i], kl[i]))
                parts = (best.token_ids.t().float(), best.probs.t(), singles)
                out[layer - 1, i] = torch.cat(parts)

    def _best(self, vector: Tensor, targets: Tensor, top: int) -> Best:
        weight, shard = self._outs.weight, self._outs.shard
        logits = torch.empty(len(vector), len(weight), dtype=torch.float32, device=weight.device)
        write_logits(logits, vector.to(weight.dtype), weight, shard=shard)
        return best_tokens(logits, targets, shard=shard, top=top)


def best_tokens(logits: Tensor, targets: Tensor, *, shard: VocabShard, top: int) -> Best:
    """From fp32 `logits` `[rows, vocab shard]` and the ids `targets` `[rows]`. Collective over the
    vocabulary.
    """
    values, ids = logits.topk(min(top, logits.shape[1]), dim=1)
    values, ids = _of_all_ranks(values, shard), _of_all_ranks(ids + shard.first, shard)
    best, at = values.topk(top, dim=1)
    here = targets.unsqueeze(1) - shard.first
    mine = (here >= 0) & (here < shard.valid)
    target = logits.gather(1, here.clamp(0, logits.shape[1] - 1)).masked_fill(~mine, 0)
    target = _sum(target, shard)
    weights = _sum((logits - best[:, :1]).exp().sum(1, keepdim=True), shard)
    rank = 1 + _sum((logits > target).sum(1), shard)
    return Best(ids.gather(1, at), (best - best[:, :1]).exp() / weights, rank)


def _of_all_ranks(part: Tensor, shard: VocabShard) -> Tensor:
    """The columns of `part` of all that hold a part of the vocabulary."""
    group = shard.group
    if group is None or group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _sum(part: Tensor, shard: VocabShard) -> Tensor:
    if shard.group is not None and shard.group.size() > 1:
        dist.all_reduce(part, group=shard.group)
    return part


def _lens(found: Tensor, top: int) -> Lens:
    """From `[layers, columns, tokens]`."""
    ids, probs, (rank, entropy, kl) = (
        found[:, :top],
        found[:, top : 2 * top],
        found[:, 2 * top :].unbind(1),
    )
    return Lens(
        token_ids=ids.transpose(1, 2).long(),
        probs=probs.transpose(1, 2),
        rank=rank.long(),
        entropy=entropy,
        kl_to_full=kl,
    )
