"""What do an internal layer policy and all above it say at response tokens, while they train?

The diagnostics of the paper's Figures 4, 5 and 7, by one forward pass of the model that trains.
After layer l, which is watched, every later layer's stream h_j is compared with h_l, and its policy
softmax(E h_j) with pi_l = softmax(E h_l); so is the full policy, softmax(E norm(h_L)). All layers
are read out where they are, so h_l goes to all pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.pipeline import PipelinedModel
from megatron_bupo.mcore.row_reader import Kept, RowReader, layers_of
from megatron_bupo.types import TokenBatch

_COLUMNS = 6  # beside those of each later layer: cosine and KL


@dataclass(frozen=True, kw_only=True)
class ProbeReadings:
    """At response tokens, fp32 nats: of the full policy pi, and of the internal layer policy pi_l
    beside it and those of later layers.
    """

    full_logprob: Tensor  # [tokens], of the response tokens
    full_entropy: Tensor  # [tokens]
    kl_to_full: Tensor  # [tokens], KL(pi_l || pi)
    kl_from_full: Tensor  # [tokens], KL(pi || pi_l)
    entropy: Tensor  # [tokens], H(h_l)
    entropy_before: Tensor  # [tokens], H(h_{l-1})
    cosine: Tensor  # [later layers, tokens], cos(h_l, h_j)
    kl_to_later: Tensor  # [later layers, tokens], KL(pi_l || pi_j)


class ProbeReader(RowReader):
    """Reads out what `pipelined` says at and after `layer`. A model that ends with this layer has
    neither later ones nor a full policy: what is said of those means nothing then.
    """

    def __init__(self, pipelined: PipelinedModel, layer: int) -> None:
        self.layer = layer
        here = sum(number >= layer for number in layers_of(pipelined))
        super().__init__(pipelined, vectors=here + 1)

    def _hooks(self) -> Iterator[Any]:
        def begin(_layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            kept = self._kept[id(kwargs["packed_seq_params"])]
            kept.streams[self.layer - 1] = kept.rows_of(kwargs["hidden_states"])

        def leave(layer: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            kept = self._kept[id(kwargs["packed_seq_params"])]
            kept.streams[layer.layer_number] = kept.rows_of(output[0])

        for number, layer in self._layers.items():
            if number == self.layer:
                yield layer.register_forward_pre_hook(begin, with_kwargs=True)
            if number >= self.layer:
                yield layer.register_forward_hook(leave, with_kwargs=True)

    def _share(self, kept: Kept) -> None:
        """h_l, from the stage that has it."""
        if self.layer not in kept.streams:
            size = len(kept.places), self.native.hidden_size
            kept.streams[self.layer] = self._outs.weight.new_zeros(size)
        parallel.sum_over_stages(kept.streams[self.layer])

    def read(self, batch: TokenBatch) -> ProbeReadings:
        """What is to be read at every response token of `batch`, in order, on every rank. Of each
        micro-batch all later layers' streams are kept until the last one has passed.
        """
        later = self.model.arch.layers - self.layer
        out = self._collect(batch, _COLUMNS + 2 * later, self._read_some)
        return ProbeReadings(
            full_logprob=out[0],
            full_entropy=out[1],
            kl_to_full=out[2],
            kl_from_full=out[3],
            entropy=out[4],
            entropy_before=out[5],
            cosine=out[_COLUMNS : _COLUMNS + later],
            kl_to_later=out[_COLUMNS + later :],
        )

    def _read_some(self, kept: Kept, some: slice, out: Tensor) -> None:
        """What the micro-batch's rows `some` say, into `out` `[columns, rows]`."""
        targets = kept.microbatch.targets[some]
        vectors: dict[str | int, Tensor] = {}
        if mpu.is_pipeline_last_stage():
            assert kept.final is not None
            vectors["full"] = self._together(kept, kept.final, some)
            full = self._outs.yardstick(vectors["full"], targets)
            out[0], out[1] = full.target_logprob, full.entropy
        there = [j for j in self._layers if j > self.layer]
        if self.layer in self._layers:
            there.append(self.layer - 1)
        vectors |= {j: self._together(kept, kept.streams[j], some) for j in there}
        if not vectors:  # this stage's layers are all below
            return
        watched = self._together(kept, kept.streams[self.layer], some)
        own = self._outs.yardstick(watched, targets)
        rows = torch.stack([vector.to(self._outs.weight.dtype) for vector in vectors.values()])
        found = self._outs.read(rows, own, compared=len(vectors))
        entropies, to_own, from_own, _ = self._outs.whole(found, own)
        later = self.model.arch.layers - self.layer
        for i, (name, vector) in enumerate(vectors.items()):
            if name == "full":
                out[2], out[3] = from_own[i], to_own[i]
            elif name == self.layer - 1:
                out[4], out[5] = own.entropy, entropies[i]
            else:
                assert isinstance(name, int)
                place = _COLUMNS + name - self.layer - 1
                out[place] = F.cosine_similarity(watched.float(), vector.float(), dim=-1)
                out[place + later] = from_own[i]
