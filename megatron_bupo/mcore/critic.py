"""PPO's critic: what will a response still earn, judged before each of its tokens?

A model like the policy's, with a value head where that has its unembedding::

    V_t = w . norm(h_L)         at the row that token t is predicted from

so V_t knows the tokens before t, as the log-prob of token t does. It is always the whole model,
whatever layer of the policy trains, and its own: weights, optimizer, learning rate. Layout and
pipeline are those of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.algorithm.value import value_loss
from megatron_bupo.config import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import VALUE_HEAD, read_index
from megatron_bupo.mcore import cpu, parallel
from megatron_bupo.mcore.learner import LearningModel
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.model import rows_for_value_head
from megatron_bupo.mcore.pipeline import put_together
from megatron_bupo.types import TokenBatch, UpdateReport


def build_critic(arch: Architecture, config: Config) -> MegatronCritic:
    """The critic of a run with the settings `config`, with the weights that it begins with.
    Collective.
    """
    own = config.of_critic
    with ExitStack() as files:
        return MegatronCritic(arch, own, _opener(arch, own, files))


def _opener(arch: Architecture, config: Config, files: ExitStack) -> Callable[[str], Any]:
    index = read_index(expand(config.model.path))
    open_stored = slice_opener(index, files)

    def open_slice(name: str) -> Any:
        if name == VALUE_HEAD and name not in index.tensors:
            return torch.zeros(1, arch.hidden_size)
        return open_stored(name)

    return open_slice


class MegatronCritic(LearningModel):
    """A model that is read out by its value head."""

    def values(self, batch: TokenBatch) -> Tensor:
        """The value before every response token, fp32 `[responses, tokens]`; 0 elsewhere."""
        [values] = put_together(batch, self._run(batch, FULL, score=self._score), columns=1)
        return values

    def _score(self, microbatch: Microbatch, hidden: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return microbatch.at, self._read_out(microbatch, hidden).unsqueeze(0)

    def _read_out(self, microbatch: Microbatch, hidden: Tensor) -> Tensor:
        """Values `[response tokens]` from the last stage's hidden states."""
        sp = self.native.sequence_parallel
        head: Any = self.last_chunk.output_layer
        return head(rows_for_value_head(hidden, microbatch.rows, sequence_parallel=sp))

    def update(self, minibatch: TokenBatch, *, lr: float) -> UpdateReport:
        """One optimizer update towards the returns of `minibatch`, which has the values from before
        the step's first update. Skipped where its loss or gradient is not finite.
        """
        minibatch = minibatch.of_learners()
        config = self.config
        weights = token_weights(
            minibatch.response_mask,
            config.algorithm.aggregation,
            longest=config.rollout.max_response_tokens,
        )
        sums = self._gradients(minibatch, FULL, partial(self._loss, minibatch, weights))
        report = _report(sums, tokens=minibatch.response_tokens)
        if self.balances:
            report["critic/expert_imbalance"] = self._imbalance(FULL)
        grad_norm = self._step(FULL, lr, loss=report["critic/value_loss"])
        skipped = not math.isfinite(grad_norm)
        return UpdateReport(
            {**report, "critic/grad_norm": grad_norm, "critic/skipped": float(skipped)}
        )

    def _loss(
        self, minibatch: TokenBatch, weights: Tensor, microbatch: Microbatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, token count and sums to report, as Megatron's schedule wants them."""
        values, at = self._read_out(microbatch, hidden), microbatch.at.cpu()

        def here(column: Tensor | None) -> Tensor:
            assert column is not None
            return column.flatten()[at].to(values.device)

        loss, clipped = value_loss(
            values,
            here(minibatch.values),
            here(minibatch.returns),
            here(weights),
            clip_range=self.config.critic.clip_range,
        )
        tokens = torch.tensor(len(at), dtype=torch.int, device=loss.device)
        return loss, tokens, torch.stack((loss.detach(), clipped))


def _report(sums: Sequence[Tensor], *, tokens: int) -> dict[str, float]:
    """What the update is worth knowing by, of all micro-batches and ranks. Collective."""
    total = torch.stack(list(sums)).sum(0) if sums else torch.zeros(2, device=cpu.device())
    total = parallel.from_last_stage(parallel.sum_over_tokens(total)).double()
    loss, clipped = total.tolist()
    return {"critic/value_loss": loss, "critic/clipped_fraction": clipped / max(tokens, 1)}
