"""What do all layers and modules of a model say at the response tokens? In one forward pass.

Its layers leave what their modules add to the residual stream, A^l and F^l of
`algorithm/entropy_flow.py`. The rest follows: h_l is the sum of what was added, and modules took in
its norm. Then all of them are read out (`row_reader.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_bupo.algorithm.entropy_flow import PolicyReadings, Readings
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.pipeline import PipelinedModel
from megatron_bupo.mcore.row_reader import Kept, RowReader
from megatron_bupo.types import TokenBatch

_OF_POLICY = [f.name for f in fields(PolicyReadings)]
_OF_MODULES = [f.name for f in fields(Readings) if f.name.startswith(("attention_", "ffn_"))]
_OF_MODEL = [f.name for f in fields(Readings) if f.name.startswith(("embedding_", "full_"))]


class ResidualReader(RowReader):
    """A model whose layers and modules are read out, raw or (`normed`) through the final norm."""

    def __init__(
        self,
        arch: Architecture,
        config: Config,
        open_slice: Callable[[str], Any],
        *,
        normed: bool = False,
    ) -> None:
        self.normed = normed
        self._policies = 1 if normed else 2  # of the stream after each layer
        super().__init__(PipelinedModel(arch, config, open_slice), vectors=self._policies + 4)
        self._final_norm = self._lent(_final_norm)
        self._now: Kept | None = None

    def _hooks(self) -> Iterator[Any]:
        def begin(layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self._now = kept = self._kept[id(kwargs["packed_seq_params"])]
            kept.streams[layer.layer_number - 1] = kept.rows_of(kwargs["hidden_states"])

        def leave(_module: Any, _args: Any, output: Any, *, layer: int) -> None:
            added, bias = output
            assert self._now is not None, "its chunk's first layer has begun"
            rows = self._now.rows_of(added)
            self._now.added.setdefault(layer, []).append(rows if bias is None else rows + bias)

        for chunk in self.model.gpt_chunks:
            layers = chunk.decoder.layers
            if len(layers):
                yield layers[0].register_forward_pre_hook(begin, with_kwargs=True)
        for number, layer in self._layers.items():
            for module in (layer.self_attention, layer.mlp):
                yield module.register_forward_hook(partial(leave, layer=number))

    def _share(self, kept: Kept) -> None:
        """The rows of the full policy, from the last stage."""
        if kept.final is None:
            kept.final = self._outs.weight.new_empty(len(kept.places), self.native.hidden_size)
        parallel.from_last_stage(kept.final)

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> Readings:
        """What is to be read at every response token of `batch`, in order, on every rank.

        Of each micro-batch what layers add is kept until the last one has passed: give it so many
        responses at a time as make about one for each pipeline stage and data-parallel rank.
        """
        count = len(_OF_MODEL) + self.arch.layers * self._columns
        return self._as_readings(self._collect(batch, count, self._read_some))

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

    def _read_some(self, kept: Kept, some: slice, out: Tensor) -> None:
        """What the micro-batch's rows `some` say, into `out` `[columns, rows]`."""
        assert kept.final is not None, "every stage has it"
        final = self._together(kept, kept.final, some)
        full = self._outs.yardstick(final, kept.microbatch.targets[some])
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
            if layer - 1 in kept.streams:
                stream = self._together(kept, kept.streams[layer - 1], some)
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


def _final_norm(chunk: Any) -> Tensor:
    return chunk.decoder.final_layernorm.weight


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
