"""The model split over the ranks, as something that scores responses under any policy.

Every rank calls every method with equal arguments; results are equal on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.mcore import cpu, model, parallel
from megatron_bupo.mcore.depth import attach, returning_hidden_states
from megatron_bupo.mcore.hf_weights import load
from megatron_bupo.mcore.logprobs import chunked_logprobs
from megatron_bupo.mcore.microbatches import Microbatch, cut, padded_length
from megatron_bupo.mcore.weight_stream import WeightStream
from megatron_bupo.types import TokenBatch


def _load_by_our_table(
    arch: Architecture, config: Config, open_slice: Callable[[str], Any]
) -> tuple[TransformerConfig, list[GPTModel], WeightStream]:
    native = model.transformer_config(arch, config)
    chunks = model.build_chunks(arch, config, native)
    load(chunks, arch, open_slice)
    return native, chunks, WeightStream(chunks, arch, native.params_dtype)


class MegatronActor:
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
        self.router = attach(self.gpt_chunks)
        self.shard = model.vocab_shard(arch)
        self.wrapped: list[Any] = self._wrap()

    def _wrap(self) -> list[Any]:
        """What the pipeline schedule runs: the chunks, with casts at the edges in bfloat16."""
        if self.native.bf16:
            return [Float16Module(self.native, chunk) for chunk in self.gpt_chunks]
        return list(self.gpt_chunks)

    def logprobs(
        self, batch: TokenBatch, policy: Policy, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of every response token under `policy`, fp32 nats `[responses,
        tokens]` each.

        The entropy at a token is that of the distribution it was drawn from. Zero outside
        responses.
        """
        out = torch.zeros(2, batch.input_ids.numel(), device=cpu.device())
        for at, values in self._run(batch, policy, score=partial(self._score, temperature)):
            out[:, at] = values
        out = parallel.from_last_stage(parallel.sum_over_tokens(out)).cpu()
        logprobs, entropies = out.view(2, *batch.input_ids.shape)
        return logprobs, entropies

    def _score(
        self, temperature: float, microbatch: Microbatch, hidden: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return microbatch.at, torch.stack(
            self._read_out(microbatch, hidden, temperature, with_entropy=True)
        )

    def _read_out(
        self, microbatch: Microbatch, hidden: Tensor, temperature: float, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[response tokens]` from the last stage's hidden states."""
        chunk = model.last_chunk(self.gpt_chunks)
        assert chunk is not None, "only the last pipeline stage reads out"
        sp = self.native.sequence_parallel
        return chunked_logprobs(
            model.rows_for_unembedding(hidden, microbatch.rows, sequence_parallel=sp),
            model.unembedding(chunk),
            microbatch.targets,
            shard=self.shard,
            temperature=temperature,
            chunk_tokens=self.config.trainer.logprob_chunk_tokens,
            with_entropy=with_entropy,
        )

    def _run(
        self,
        batch: TokenBatch,
        policy: Policy,
        *,
        score: Callable[..., Any] | None = None,
        learn: Callable[..., Any] | None = None,
    ) -> list[Any]:
        """Push this rank's share of `batch` through the pipeline, with backward passes if there is
        a `learn`.

        Returns what the last stage's `score(microbatch, hidden)` or `learn(microbatch, hidden)`
        gave for each micro-batch; nothing on other stages.
        """
        size, vpp = self.config.trainer.microbatch_size or 8, self.config.parallel.vpp
        length = padded_length(
            batch, multiple=self.config.parallel.tp if self.native.sequence_parallel else 1
        )
        stages = mpu.get_pipeline_model_parallel_world_size() if vpp > 1 else 1
        microbatches = list(
            cut(
                batch,
                self._share_of(len(batch)),
                size=size,
                length=length,
                count_multiple=stages,
                device=cpu.device(),
            )
        )

        def forward(
            iterator: Iterator[Microbatch], wrapped: Any
        ) -> tuple[Tensor, Callable[..., Any]]:
            microbatch = next(iterator)
            gpt = self.gpt_chunks[self.wrapped.index(wrapped)]
            with returning_hidden_states(gpt):
                out = wrapped(microbatch.input_ids, microbatch.position_ids, None)
            return out, partial(learn or score, microbatch)  # type: ignore[arg-type]

        iterators = [iter(microbatches) for _ in self.wrapped]
        with self.router.computing(policy), torch.set_grad_enabled(learn is not None):
            return get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iterators if vpp > 1 else iterators[0],
                model=self.wrapped if vpp > 1 else self.wrapped[0],
                num_microbatches=len(microbatches),
                seq_length=length,
                micro_batch_size=size,
                forward_only=learn is None,
                collect_non_loss_data=learn is None,
            )

    def _share_of(self, responses: int) -> slice:
        """The responses of this rank's data-parallel replica: an equal, contiguous share."""
        dp, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        per_rank = -(-responses // dp)
        return slice(min(rank * per_rank, responses), min((rank + 1) * per_rank, responses))
