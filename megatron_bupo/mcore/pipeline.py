"""A model split over the ranks, and a batch pushed through it: forward, or forward and backward.

What is read out of the last stage's hidden states, and what is learnt from that, is for those who
build on it: the actor reads log-probs (`actor.py`), PPO's critic values (`critic.py`).

Every rank calls every method with equal arguments; results are equal on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bupo import progress
from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.mcore import cpu, model, parallel
from megatron_bupo.mcore.attention import use_packed_rows
from megatron_bupo.mcore.depth import attach, returning_hidden_states
from megatron_bupo.mcore.hf_weights import load
from megatron_bupo.mcore.microbatches import Microbatch, cut, deal, input_lengths
from megatron_bupo.mcore.moe import has_balance_loss, padding_mask
from megatron_bupo.mcore.packed import Split
from megatron_bupo.mcore.weight_stream import WeightStream
from megatron_bupo.types import TokenBatch


def _load_by_our_table(
    arch: Architecture, config: Config, open_slice: Callable[[str], Any]
) -> tuple[TransformerConfig, list[GPTModel], WeightStream]:
    native = model.transformer_config(arch, config)
    chunks = model.build_chunks(arch, config, native)
    load(chunks, arch, open_slice)
    return native, chunks, WeightStream(chunks, arch, native.params_dtype)


class PipelinedModel:
    """The model of `arch` with weights from `open_slice(hf_name)`, under the layout of `config`."""

    def __init__(
        self, arch: DecoderSizes, config: Config, open_slice: Callable[[str], Any]
    ) -> None:
        self.arch, self.config = arch, config
        if isinstance(arch, Architecture):
            loaded = _load_by_our_table(arch, config, open_slice)
        else:
            from megatron_bupo.mcore import bridge  # optional, and seconds to import

            loaded = bridge.load(arch, config)
        self.native, self.gpt_chunks, self.weights = loaded
        use_packed_rows(self.gpt_chunks)
        self.router = attach(self.gpt_chunks)
        self.balances = has_balance_loss(self.native)
        self.split = Split(
            cp=mpu.get_context_parallel_world_size(),
            rank=mpu.get_context_parallel_rank(),
            multiple=config.parallel.tp if self.native.sequence_parallel else 1,
        )
        self.wrapped: list[Any] = self._wrap()

    def _wrap(self) -> list[Any]:
        """What the pipeline schedule runs: the chunks, with casts at the edges in bfloat16."""
        if self.native.bf16:
            return [Float16Module(self.native, chunk) for chunk in self.gpt_chunks]
        return list(self.gpt_chunks)

    @property
    def last_chunk(self) -> GPTModel:
        """The chunk that is read out, on the last stage."""
        chunk = model.last_chunk(self.gpt_chunks)
        assert chunk is not None, "only the last pipeline stage reads out"
        return chunk

    def _run(
        self,
        batch: TokenBatch,
        policy: Policy,
        *,
        score: Callable[..., Any] | None = None,
        learn: Callable[..., Any] | None = None,
    ) -> list[Any]:
        """`run` with this rank's share of `batch`."""
        return self.run(self.microbatches(batch), policy, score=score, learn=learn)

    def run(
        self,
        microbatches: Sequence[Microbatch],
        policy: Policy,
        *,
        score: Callable[..., Any] | None = None,
        learn: Callable[..., Any] | None = None,
    ) -> list[Any]:
        """Push this rank's `microbatches` through the pipeline, with backward passes if there is a
        `learn`.

        Returns what the last stage's `score(microbatch, hidden)` or `learn(microbatch, hidden)`
        gave for each micro-batch; nothing on other stages.
        """
        vpp = self.config.parallel.vpp

        def forward(
            iterator: Iterator[Microbatch], wrapped: Any
        ) -> tuple[Tensor, Callable[..., Any]]:
            progress.beat()
            microbatch = next(iterator)
            gpt = self.gpt_chunks[self.wrapped.index(wrapped)]
            with returning_hidden_states(gpt):
                packed = microbatch.packed
                out = wrapped(
                    microbatch.input_ids,
                    packed.positions.unsqueeze(0),
                    None,
                    packed_seq_params=packed,
                    padding_mask=padding_mask(gpt, microbatch.padding) if self.balances else None,
                )
            return out, partial(learn or score, microbatch)  # type: ignore[arg-type]

        iterators = [iter(microbatches) for _ in self.wrapped]
        with self.router.computing(policy), torch.set_grad_enabled(learn is not None):
            return get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iterators if vpp > 1 else iterators[0],
                model=self.wrapped if vpp > 1 else self.wrapped[0],
                num_microbatches=len(microbatches),
                # Over all context-parallel ranks; read where stages send rows, all of one length.
                seq_length=microbatches[0].packed.tokens * self.split.cp,
                micro_batch_size=1,
                forward_only=learn is None,
                collect_non_loss_data=learn is None,
            )

    def microbatches(self, batch: TokenBatch) -> list[Microbatch]:
        """This rank's micro-batches; a pipeline gets at least one per stage, to keep all busy."""
        trainer, stages = self.config.trainer, self.config.parallel.pp
        dealt = deal(
            input_lengths(batch),
            ranks=mpu.get_data_parallel_world_size(),
            max_tokens=trainer.max_tokens_per_microbatch,
            max_responses=trainer.microbatch_size,
            at_least=stages,
            multiple=stages if self.config.parallel.vpp > 1 else 1,
        )
        mine = dealt[mpu.get_data_parallel_rank()]
        return cut(batch, mine, split=self.split, equal=stages > 1, device=cpu.device())


def put_together(
    batch: TokenBatch, scored: Iterable[tuple[Tensor, Tensor]], *, columns: int
) -> Tensor:
    """What the last stages found at response tokens, of the whole `batch` on every rank, fp32
    `[columns, responses, tokens]`, 0 elsewhere. Each has where its response tokens stand, and
    `[columns, response tokens]`. Collective.
    """
    out = torch.zeros(columns, batch.input_ids.numel(), device=cpu.device())
    for at, found in scored:
        out[:, at] = found
    out = parallel.from_last_stage(parallel.sum_over_tokens(out)).cpu()
    return out.view(columns, *batch.input_ids.shape)
