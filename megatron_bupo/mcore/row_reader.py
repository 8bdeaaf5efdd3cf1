"""What passes through a model at the rows that response tokens are predicted from, read out.

While a micro-batch passes, hooks keep those rows of what they are asked to look at. Then a few
tokens at a time go through the read-outs, so that logits exist for those alone (`read_outs.py`).
The model may be somebody else's, the trainer's say: hooks are there for one pass only.

Read-outs cost far more than layers do (a row of logits is 2 hidden x vocabulary operations), so
every pipeline stage reads out its own layers: the last one lends the others its part of the
unembedding for as long as the reader lives. Under sequence parallelism rows stay where their tokens
are, and a few at a time are brought together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_bupo import progress
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.config.schema import Config
from megatron_bupo.mcore import cpu, model, parallel
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.pipeline import PipelinedModel
from megatron_bupo.mcore.read_outs import ReadOuts
from megatron_bupo.types import TokenBatch

# Of each micro-batch some vectors a layer are kept for every response token
TOKENS_PER_MICROBATCH = 1024
ROWS = 256  # of logits at a time, at most: products of matrices gain no more beyond


@dataclass
class Kept:
    """What a micro-batch has left on this rank: `[rows here, hidden]` each."""

    microbatch: Microbatch
    here: (
        Tensor  # which of its rows are on this rank, as indices; all but with sequence parallelism
    )
    places: Tensor  # of those, in this rank's tokens
    streams: dict[int, Tensor] = field(default_factory=dict)  # h_l by l
    added: dict[int, list[Tensor]] = field(default_factory=dict)  # [A, F] by layer
    final: Tensor | None = None  # norm(h_L), on the last stage

    def rows_of(self, hidden: Tensor) -> Tensor:
        """Those of `[tokens, 1, hidden]`."""
        return hidden.flatten(0, 1).index_select(0, self.places)


ReadSome = Callable[[Kept, slice, Tensor], None]


class RowReader(ABC):
    """Reads out what `model` computes, up to `vectors` vectors of a token at a time."""

    def __init__(self, pipelined: PipelinedModel, *, vectors: int) -> None:
        self.model = pipelined
        self.arch, self.native = pipelined.arch, pipelined.native
        self._kept: dict[int, Kept] = {}  # by id of the packed row, which layers are given
        self._layers = layers_of(pipelined)
        config, tp = pipelined.config, pipelined.config.parallel.tp
        padded = model.padded_vocab_size(self.arch, tp)
        self._outs = ReadOuts(
            self._lent(model.unembedding, padded // tp),
            model.vocab_shard(self.arch),
            vectors=vectors,
            rows=min(config.trainer.logprob_chunk_tokens, ROWS),
        )

    @abstractmethod
    def _hooks(self) -> Iterator[Any]:
        """Handles of the hooks that keep what is read, as they are set."""

    @abstractmethod
    def _share(self, kept: Kept) -> None:
        """Bring what one stage has kept to the stages that read it. Collective."""

    @torch.no_grad()
    def _lent(self, pick: Callable[[Any], Tensor], *rows: int) -> Tensor:
        """What `pick` takes from the last stage's chunk, `[*rows, hidden]`, on every stage."""
        last = model.last_chunk(self.model.gpt_chunks)
        if last is not None:
            held = pick(last).detach()
        else:
            kind: Any = {"dtype": self.native.params_dtype, "device": cpu.device()}
            held = torch.empty(*rows, self.native.hidden_size, **kind)
        return parallel.from_last_stage(held)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside the block what passes is kept."""
        handles: Sequence[Any] = ()
        try:
            handles = list(self._hooks())
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _collect(self, batch: TokenBatch, columns: int, read_some: ReadSome) -> Tensor:
        """What `read_some` finds at the response tokens of `batch`, `[columns, tokens]`, put
        together from all stages and ranks.
        """
        microbatches = self.model.microbatches(batch)
        self._kept = {id(m.packed): self._keeping(m) for m in microbatches}
        with self._watching():
            self.model.run(microbatches, FULL, score=self._keep_final)
        mask = batch.response_mask.flatten()
        place = (mask.cumsum(0) - 1).to(cpu.device())  # among the response tokens
        out = torch.zeros(columns, int(mask.sum()), device=cpu.device())
        with self._outs.at_work():
            for kept in self._kept.values():
                out[:, place[kept.microbatch.at]] = self._read_out(kept, columns, read_some)
        self._kept = {}
        return parallel.sum_over_stages(parallel.sum_over_tokens(out)).cpu()

    def _keeping(self, microbatch: Microbatch) -> Kept:
        rows = microbatch.rows
        if not self.native.sequence_parallel:
            return Kept(microbatch, torch.arange(len(rows), device=rows.device), rows)
        group = parallel.tensor_group()
        places = rows - group.rank() * (microbatch.packed.tokens // group.size())
        inside = (places >= 0) & (places < microbatch.packed.tokens // group.size())
        return Kept(microbatch, inside.nonzero().flatten(), places[inside])

    def _keep_final(self, microbatch: Microbatch, hidden: Tensor, **_: Any) -> None:
        kept = self._kept[id(microbatch.packed)]
        # In bfloat16 the last stage answers in fp32, of which the unembedding sees bfloat16
        kept.final = kept.rows_of(hidden).to(self._outs.weight.dtype)

    def _read_out(self, kept: Kept, columns: int, read_some: ReadSome) -> Tensor:
        """Of this stage's layers `[columns, rows]`; else 0."""
        rows = len(kept.microbatch.rows)
        out = torch.zeros(columns, rows, device=cpu.device())
        if not rows:
            return out
        self._share(kept)
        for start in range(0, rows, self._outs.tokens):
            progress.beat()
            some = slice(start, min(start + self._outs.tokens, rows))
            read_some(kept, some, out[:, some])
        return out

    def _together(self, kept: Kept, rows: Tensor, some: slice) -> Tensor:
        """Of the micro-batch's rows, of which `rows` are here, `some`. Collective over the
        tensor-parallel ranks under sequence parallelism.
        """
        if not self.native.sequence_parallel:
            return rows[some]
        inside = (kept.here >= some.start) & (kept.here < some.stop)
        out = rows.new_zeros(some.stop - some.start, rows.shape[1])
        out[kept.here[inside] - some.start] = rows[inside]
        dist.all_reduce(out, group=parallel.tensor_group())
        return out


def layers_of(pipelined: PipelinedModel) -> dict[int, Any]:
    """Those of this rank, by number from 1."""
    decoders: list[Any] = [chunk.decoder for chunk in pipelined.gpt_chunks]
    return {layer.layer_number: layer for decoder in decoders for layer in decoder.layers}


def tokens_at_once(config: Config) -> int:
    """As many as make about one micro-batch for each pipeline stage and data-parallel rank: what
    to give a reader at a time.
    """
    most = min(config.trainer.max_tokens_per_microbatch, TOKENS_PER_MICROBATCH)
    return most * config.parallel.pp * mpu.get_data_parallel_world_size()
