"""The model split over the ranks, as something that scores responses under any policy.

Every rank calls every method with equal arguments; results are equal on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.mcore import model
from megatron_bupo.mcore.logprobs import VocabShard, chunked_logprobs
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.pipeline import PipelinedModel, put_together
from megatron_bupo.types import TokenBatch


class MegatronActor(PipelinedModel):
    """A model that is read out by its unembedding."""

    @property
    def shard(self) -> VocabShard:
        """This rank's part of the vocabulary."""
        return model.vocab_shard(self.arch)

    def logprobs(
        self,
        batch: TokenBatch,
        policy: Policy,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of every response token under `policy`, fp32 nats `[responses,
        tokens]` each.

        The entropy at a token is that of the distribution it was drawn from. Zero outside
        responses, and entropies without `with_entropy`.
        """
        score = partial(self._score, temperature=temperature, with_entropy=with_entropy)
        logprobs, entropies = put_together(batch, self._run(batch, policy, score=score), columns=2)
        return logprobs, entropies

    def _score(
        self,
        microbatch: Microbatch,
        hidden: Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        return microbatch.at, torch.stack(
            self._read_out(microbatch, hidden, temperature, with_entropy=with_entropy)
        )

    def _read_out(
        self, microbatch: Microbatch, hidden: Tensor, temperature: float, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[response tokens]` from the last stage's hidden states."""
        sp = self.native.sequence_parallel
        return chunked_logprobs(
            model.rows_for_unembedding(hidden, microbatch.rows, sequence_parallel=sp),
            model.unembedding(self.last_chunk),
            microbatch.targets,
            shard=self.shard,
            temperature=temperature,
            chunk_tokens=self.config.trainer.logprob_chunk_tokens,
            with_entropy=with_entropy,
        )
