"""What do all layers and modules of a model say at the response tokens? In one forward pass.

While a micro-batch passes, its layers leave what their modules add to the residual stream, A^l and
F^l of `algorithm/entropy_flow.py`, at the rows that response tokens are predicted from. The rest
follows: h_l is the sum of what was added, and modules took in its norm. Then a few tokens at a time
go through all read-outs of all layers, so that logits exist for those alone (`read_outs.py`).

Read-outs cost far more than the layers do (a row of logits is 2 hidden x vocabulary operations,
five or six times per layer), so every pipeline stage reads its own layers: the last one lends the
others its part of the unembedding, for good, and of each micro-batch the rows of the full policy.
Under sequence parallelism rows stay where their tokens are, and a few at a time are brought
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_bupo import progress
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.algorithm.entropy_flow import PolicyReadings, Readings
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.mcore import cpu, model, parallel
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.pipeline import PipelinedModel
from megatron_bupo.mcore.read_outs import ReadOuts
from megatron_bupo.types import TokenBatch

ROWS = 256  # of logits at a time, at most: products of matrices gain no more beyond
_OF_POLICY = [f.name for f in fields(PolicyReadings)]
_OF_MODULES = [f.name for f in fields(Readings) if f.name.startswith(("attention_", "ffn_"))]
_OF_MODEL = [f.name for f in fields(Readings) if f.name.startswith(("embedding_", "full_"))]


@dataclass
class Kept:
    """What a micro-batch has left on this rank: `[rows here, hidden]` each."""

    microbatch: Microbatch
    here: (
        Tensor  # which of its rows are on this rank, as indices; all but with sequence parallelism
    )
    places: Tensor  # of those, in this rank's tokens
    streams: dict[int, Tensor] = field(default_factory=dict)  # into a chunk, by its first layer
    added: dict[int, list[Tensor]] = field(default_factory=dict)  # [A, F] by layer
    final: Tensor | None = None  # norm(h_L), on the last stage

    def rows_of(self, hidden: Tensor) -> Tensor:
        """Those of `[tokens, 1, hidden]`."""
        return hidden.flatten(0, 1).index_select(0, self.places)


class ResidualReader(PipelinedModel):
    """A model whose layers and modules are read out, raw or (`normed`) through the final norm."""

    def __init__(
        self,
        arch: Architecture,
        config: Config,
        open_slice: Callable[[str], Any],
        *,
        normed: bool = False,
    ) -> None:
        super().__init__(arch, config, open_slice)
        self.normed = normed
        self._kept: dict[int, Kept] = {}  # by id of the packed row, which layers are given
        self._now: Kept | None = None
        self._layers: dict[int, Any] = {}  # by number, from 1
        for chunk in self.gpt_chunks:
            self._watch(chunk.decoder.layers)
        self._policies = 1 if normed else 2  # of the stream after each layer
        with torch.no_grad():
            weight, self._final_norm = self._lent()
            self._outs = ReadOuts(
                weight,
                model.vocab_shard(arch),
                vectors=self._policies + 4,
                rows=min(config.trainer.logprob_chunk_tokens, ROWS),
            )

    def _watch(self, layers: Any) -> None:
        def begin(layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self._now = kept = self._kept[id(kwargs["packed_seq_params"])]
            kept.streams[layer.layer_number] = kept.rows_of(kwargs["hidden_states"])

        def leave(_module: Any, _args: Any, output: Any, *, layer: int) -> None:
            added, bias = output
            assert self._now is not None, "its chunk's first layer has begun"
            rows = self._now.rows_of(added)
            self._now.added.setdefault(layer, []).append(rows if bias is None else rows + bias)

        if len(layers):
            layers[0].register_forward_pre_hook(begin, with_kwargs=True)
        for layer in layers:
            self._layers[layer.layer_number] = layer
            for module in (layer.self_attention, layer.mlp):
                module.register_forward_hook(partial(leave, layer=layer.layer_number))

    def _lent(self) -> tuple[Tensor, Tensor]:
        """The unembedding's part `[vocab shard, hidden]` and the final norm's weight, which the
        last stage has, on every stage.
        """
        last = model.last_chunk(self.gpt_chunks)
        if last is not None:
            norm: Any = last.decoder.final_layernorm
            held = model.unembedding(last).detach(), norm.weight.detach()
        else:
            tp, hidden = self.config.parallel.tp, self.native.hidden_size
            shape = (model.padded_vocab_size(self.arch, tp) // tp, hidden)
            kind: Any = {"dtype": self.native.params_dtype, "device": cpu.device()}
            held = torch.empty(shape, **kind), torch.empty(hidden, **kind)
        for tensor in held:
            parallel.from_last_stage(tensor)
        return held

    def _microbatches(self, batch: TokenBatch) -> list[Microbatch]:
        microbatches = super()._microbatches(batch)
        self._kept = {id(m.packed): self._keeping(m) for m in microbatches}
        return microbatches

    def _keeping(self, microbatch: Microbatch) -> Kept:
        rows = microbatch.rows
        if not self.native.sequence_parallel:
            return Kept(microbatch, torch.arange(len(rows), device=rows.device), rows)
        group = parallel.tensor_group()
        places = rows - group.rank() * (microbatch.packed.tokens // group.size())
        inside = (places >= 0) & (places < microbatch.packed.tokens // group.size())
        return Kept(microbatch, inside.nonzero().flatten(), places[inside])

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> Readings:
        """What is to be read at every response token of `batch`, in order, on every rank.

        Of each micro-batch what layers add is kept until the last one has passed: give it so many
        responses at a time as make about one for each pipeline stage and data-parallel rank.
        """
        count = len(_OF_MODEL) + self.arch.layers * self._columns
        return self._as_readings(self._collect(batch, count, self._read_some))

    def _collect(
        self, batch: TokenBatch, columns: int, read_some: Callable[[Kept, slice, Tensor], None]
    ) -> Tensor:
        """What `read_some` finds at the response tokens of `batch`, `[columns, tokens]`, put
        together from all stages and ranks.
        """
        self._run(batch, FULL, score=self._keep_final)
        mask = batch.response_mask.flatten()
        place = (mask.cumsum(0) - 1).to(cpu.device())  # among the response tokens
        out = torch.zeros(columns, int(mask.sum()), device=cpu.device())
        with self._outs.at_work():
            for kept in self._kept.values():
                out[:, place[kept.microbatch.at]] = self._read_out(kept, columns, read_some)
        self._kept, self._now = {}, None
        return parallel.sum_over_stages(parallel.sum_over_tokens(out)).cpu()

    def _keep_final(self, microbatch: Microbatch, hidden: Tensor, **_: Any) -> None:
        kept = self._kept[id(microbatch.packed)]
        # In bfloat16 the last stage answers in fp32, of which the unembedding sees bfloat16
        kept.final = kept.rows_of(hidden).to(self._outs.weight.dtype)

    @property
    def _columns(self) -> int:
        """Numbers per layer and token."""
        return len(_OF_MODULES) + len(_OF_POLICY) * self._policies

    def _as_readings(self, out: Tensor) -> Readings:
        of_model = dict(zip(_OF_MODEL, out[: len(_OF_MODEL)], strict=True))
        columns = out[len(_OF_MODEL) :].unflatten(0, (self.arch.layers, self._columns)).unbind(1)
        modules, policies = columns[: len(_OF_MODULES)], columns[len(_OF_MODULES) :]
        layer, *normed_layer = (
            PolicyReadings(**dict(zip(_OF_POLICY, policies[i : i + len(_OF_POLICY)], strict=True)))
            for i in range(0, len(policies), len(_OF_POLICY))
        )
        return Readings(
            **of_model,
            **dict(zip(_OF_MODULES, modules, strict=True)),
            layer=layer,
            normed_layer=next(iter(normed_layer), None),
        )

    def _read_out(
        self, kept: Kept, columns: int, read_some: Callable[[Kept, slice, Tensor], None]
    ) -> Tensor:
        """Of this stage's layers `[columns, rows]`; else 0."""
        rows = len(kept.microbatch.rows)
        out = torch.zeros(columns, rows, device=cpu.device())
        if not rows:
            return out
        if kept.final is None:
            kept.final = self._outs.weight.new_empty(len(kept.places), self.native.hidden_size)
        parallel.from_last_stage(kept.final)
        for start in range(0, rows, self._outs.tokens):
            progress.beat()
            some = slice(start, min(start + self._outs.tokens, rows))
            read_some(kept, some, out[:, some])
        return out

    def _read_some(self, kept: Kept, some: slice, out: Tensor) -> None:
        """What the micro-batch's rows `some` say, into `out` `[columns, rows]`."""
        assert kept.final is not None, "every stage has it"
        final = self._together(kept, kept.final, some)
        full = self._outs.full(final, kept.microbatch.targets[some])
        if mpu.is_pipeline_last_stage():
            out[1], out[2] = full.entropy, full.target_logprob
        layers, found, cosines = [], [], []
        for layer, stream, attention, ffn in self._path(kept, some):
            if layer == 1:
                found.append(self._outs.read(self._as_read([stream])))
            vectors = self._vectors(self._layers[layer], stream, attention, ffn)
            found.append(self._outs.read(vectors, full, compared=self._policies))
            cosines.append((_cosine(attention, stream), _cosine(ffn, stream + attention)))
            layers.append(layer)
        if not layers:
            return
        values = self._outs.whole(torch.cat(found), full)  # [4, vectors, tokens]
        if 1 in layers:
            out[0], values = values[0, 0], values[:, 1:]
        by_layer = out[len(_OF_MODEL) :].unflatten(0, (self.arch.layers, self._columns))
        parts = values.chunk(len(layers), dim=1)
        for layer, part, cosine in zip(layers, parts, cosines, strict=True):
            policies, modules = part[:, : self._policies], part[0, self._policies :]
            by_layer[layer - 1] = torch.stack(
                [*modules, *cosine, *policies.transpose(0, 1).flatten(0, 1)]
            )

    def _path(self, kept: Kept, some: slice) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """`(l, h_{l-1}, A^l, F^l)` of this stage's layers at the rows `some`."""
        stream = torch.empty(0)
        for layer, added in sorted(kept.added.items()):
            if layer in kept.streams:
                stream = self._together(kept, kept.streams[layer], some)
            attention, ffn = (self._together(kept, rows, some) for rows in added)
            yield layer, stream, attention, ffn
            stream = stream + attention + ffn

    def _vectors(self, layer: Any, stream: Tensor, attention: Tensor, ffn: Tensor) -> Tensor:
        """All that is read out of a layer, `[vectors, rows, hidden]`: the stream after it, raw and
        normed or normed alone; then what its modules put out and took in.
        """
        middle = stream + attention
        after = middle + ffn
        return self._as_read(
            [
                after,
                *([] if self.normed else [self._rms_norm(after, self._final_norm)]),
                attention,
                self._rms_norm(stream, _norm_of(layer.input_layernorm, layer.self_attention)),
                ffn,
                self._rms_norm(middle, _norm_of(layer.pre_mlp_layernorm, layer.mlp)),
            ]
        )

    def _as_read(self, vectors: list[Tensor]) -> Tensor:
        """`vectors` as the unembedding meets them."""
        stacked = torch.stack(vectors)
        return self._rms_norm(stacked, self._final_norm) if self.normed else stacked

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `spec.RMSNorm` and Transformer Engine have it."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.native.layernorm_epsilon)
        return weight * normed.to(x.dtype)

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


def _norm_of(norm: Any, module: Any) -> Tensor:
    """The weight of a module's `norm`; Transformer Engine has it in the linear layer behind it."""
    weight = getattr(norm, "weight", None)
    if weight is not None:
        return weight
    linear = module.linear_qkv if hasattr(module, "linear_qkv") else module.linear_fc1
    return linear.layer_norm_weight


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """`[rows]`; 0 where one of the two is zero."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
