"""What do several vectors of a token say through one unembedding, and how far from one of them?

Logits of all vectors of a few tokens lie in one buffer, which each layer overwrites. Of every
p = softmax(E x) the entropy is asked, of some also how far they are from a policy pi, the yardstick
(the full policy, mostly)::

    H(p)       = log Z - sum_v p_v z_v                z = E x, Z = sum_v exp(z_v)
    KL(p||pi)  = -H(p) - sum_v p_v log pi_v
    KL(pi||p)  = -H(pi) - sum_v pi_v log p_v
    agreement  = is the logit of pi's most probable token the largest?

Each tensor-parallel rank sums over its part of the vocabulary, relative to its own largest logit;
for all read-outs of a piece of tokens together the parts are put together by two small all-reduces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.mcore.logprobs import VocabShard, write_logits


class Yardstick(NamedTuple):
    """A policy at some tokens, which others are compared with; nats."""

    entropy: Tensor  # [tokens]
    target_logprob: Tensor  # [tokens]
    # of this rank's part of the vocabulary
    logprobs: Tensor  # [tokens, vocab shard]
    probs: Tensor  # [tokens, vocab shard]
    best: Tensor  # [tokens, 1], the most probable token's place, where it is here
    has_best: Tensor  # [tokens], is it here?


class ReadOuts:
    """Read-outs of up to `vectors` vectors of each token, `rows` rows of logits at a time, through
    `weight` `[vocab shard, hidden]`; inside `with read_outs.at_work(): ...`.
    """

    def __init__(self, weight: Tensor, shard: VocabShard, *, vectors: int, rows: int) -> None:
        self.weight, self.shard, self.vectors = weight, shard, vectors
        self.tokens = max(1, rows // vectors)  # that fit at a time
        self._logits = self._logprobs = self._probs = self._exp = weight.new_empty(0)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the buffers inside the block."""
        rows = (self.vectors * self.tokens, self.tokens, self.tokens, self.tokens)
        nothing = self._logits
        self._logits, self._logprobs, self._probs, self._exp = (
            torch.empty(n, len(self.weight), dtype=torch.float32, device=self.weight.device)
            for n in rows
        )
        try:
            yield
        finally:
            self._logits = self._logprobs = self._probs = self._exp = nothing

    def yardstick(self, vector: Tensor, targets: Tensor) -> Yardstick:
        """softmax(E x) of `vector` `[tokens, hidden]`, with the log-probs of `targets`; the full
        policy's is norm(h_L). Valid until the next one is asked for. Collective over the
        vocabulary.
        """
        tokens, shard = len(vector), self.shard
        z, probs = self._logprobs[:tokens], self._probs[:tokens]
        write_logits(z, vector.to(self.weight.dtype), self.weight, shard=shard)
        own, best = z.max(dim=1, keepdim=True)
        at = (targets.unsqueeze(1) - shard.first).clamp(0, max(shard.valid - 1, 0))
        mine = at + shard.first == targets.unsqueeze(1)
        top = self._over_ranks(own.clone(), dist.ReduceOp.MAX)
        target = z.gather(1, at).sub_(top).mul_(mine)
        z.sub_(top)
        torch.exp(z, out=probs)
        sums = torch.stack((probs.sum(1), torch.linalg.vecdot(probs, z), target.squeeze(1)))
        weights, expected, target = self._over_ranks(sums, dist.ReduceOp.SUM)
        log_weights = weights.log()
        z.sub_(log_weights.unsqueeze(1))
        probs.div_(weights.unsqueeze(1))
        # Equal logits on two ranks: the lower id is the most probable
        first = torch.where(own == top, best + shard.first, torch.iinfo(torch.long).max)
        is_best = self._over_ranks(first.clone(), dist.ReduceOp.MIN) == first
        return Yardstick(
            entropy=log_weights - expected / weights,
            target_logprob=target - log_weights,
            logprobs=z,
            probs=probs,
            best=best,
            has_best=(is_best & (own == top)).squeeze(1),
        )

    def read(self, vectors: Tensor, pi: Yardstick | None = None, *, compared: int = 0) -> Tensor:
        """This rank's part of what `vectors` `[vectors, tokens, hidden]` say, for `whole`:
        `[vectors, 6, tokens]`. The first `compared` are compared with `pi`.
        """
        count, tokens, _ = vectors.shape
        rows = vectors.to(self.weight.dtype).flatten(0, 1)
        logits = self._logits[: count * tokens]
        write_logits(logits, rows, self.weight, shard=self.shard)
        found = torch.zeros(count, 6, tokens, device=vectors.device)
        for i, z in enumerate(logits.unflatten(0, (count, tokens))):
            top, weights, expected, log_pi, own_log, best = found[i]
            torch.amax(z, 1, out=top)
            if pi is not None and i < compared:
                best[:] = z.gather(1, pi.best).squeeze(1) * pi.has_best
            z.sub_(top.unsqueeze(1))
            exp = torch.exp(z, out=self._exp[:tokens])
            weights[:] = exp.sum(1)
            expected[:] = torch.linalg.vecdot(exp, z)
            if pi is not None and i < compared:
                log_pi[:] = torch.linalg.vecdot(exp, pi.logprobs)
                own_log[:] = torch.linalg.vecdot(pi.probs, z)
        return found

    def whole(self, found: Tensor, pi: Yardstick) -> Tensor:
        """Entropy, KL to and from the yardstick (nats) and agreement, `[4, vectors, tokens]`,
        from the parts `found` `[vectors, 6, tokens]` of the ranks; only the entropy counts of what
        was not compared. Collective over the vocabulary.
        """
        own, weights, expected, log_pi, own_log, best = found.unbind(1)
        top = self._over_ranks(own.clone(), dist.ReduceOp.MAX)
        lower = own - top
        share = lower.exp()
        here = pi.probs.sum(1)  # of its mass; 1 on a rank with all the vocabulary
        sums = torch.stack(
            (
                share * weights,
                share * (expected + lower * weights),
                share * log_pi,
                own_log + lower * here,
                best,
            )
        )
        weights, expected, log_pi, own_log, best = self._over_ranks(sums, dist.ReduceOp.SUM)
        entropy = weights.log() - expected / weights
        return torch.stack(
            (
                entropy,
                -entropy - log_pi / weights,
                weights.log() - own_log - pi.entropy,
                (best == top).float(),
            )
        )

    def _over_ranks(self, parts: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        """`parts` of all that hold a part of the vocabulary, in place."""
        group = self.shard.group
        if group is not None and group.size() > 1 and parts.numel():
            dist.all_reduce(parts, op=how, group=group)
        return parts
