"""What a torch_dist checkpoint computes, as Megatron-Core itself loads it: log-probs of the whole
vocabulary at every position.

Verification asks for a second way to the weights. None of them is read by our own tables here: the
model is built empty, every number in it NaN, and Megatron-Core's `dist_checkpointing` fills it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from safetensors.torch import save_file
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.mcore import model, parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.microbatches import Microbatch
from megatron_bupo.mcore.torch_dist import METADATA
from megatron_bupo.types import TokenBatch


class _Unknown:
    """In the place of a tensor on disk: NaN, whatever part of it is asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, part: Any) -> Tensor:
        return torch.tensor(torch.nan).expand(self.shape)[part]


class WholeVocabulary(MegatronActor):
    """The model of `arch` with the weights of the torch_dist checkpoint at `path`; `stacked`: all
    layers in one tensor.
    """

    def __init__(self, arch: Architecture, config: Config, path: Path, *, stacked: bool) -> None:
        shapes = expected_tensors(arch)
        super().__init__(arch, config, lambda name: _Unknown(shapes[name]))
        metadata = METADATA | {"non_homogeneous_layers": not stacked}
        state = {
            f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata))
            for i, chunk in enumerate(self.gpt_chunks)
        }
        try:
            loaded: Any = dist_checkpointing.load(state, str(path))
        except Exception as error:  # of every kind, depending on what is damaged
            reason = f"Megatron-Core cannot load it ({type(error).__name__}: {error})"
            raise InputError(str(path), reason, "restore it from a copy") from error
        for i, chunk in enumerate(self.gpt_chunks):
            chunk.load_state_dict(loaded[f"model{i}"], strict=False)  # extra states are optional

    def whole_logprobs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Of `[responses, tokens]`: log-probs `[positions, vocab]` in fp32 nats, and which
        positions these are, as flat indices of the token that each predicts.

        Those that this rank's micro-batches had; empty but on the last pipeline stage. Collective.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        mask[:, 0] = False
        nothing = torch.zeros(input_ids.shape)
        batch = TokenBatch(input_ids, mask, nothing, nothing)
        scored = self._run(batch, FULL, score=self._everywhere)
        return {
            "at": torch.cat([at.cpu() for at, _ in scored] or [torch.empty(0, dtype=torch.long)]),
            "logprobs": torch.cat([logprobs.cpu() for _, logprobs in scored] or [torch.empty(0)]),
        }

    def _everywhere(
        self, microbatch: Microbatch, hidden: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        sp = self.native.sequence_parallel
        rows = model.rows_for_unembedding(hidden, microbatch.rows, sequence_parallel=sp)
        logits = (rows @ model.unembedding(self.last_chunk).t()).float()
        if self.shard.group is not None:
            parts = [torch.empty_like(logits) for _ in range(self.shard.group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.shard.group)
            logits = torch.cat(parts, dim=-1)
        return microbatch.at, logits[:, : self.arch.vocab_size].log_softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A torch_dist checkpoint under a layout, tokens to read, and a directory for the answers."""

    layout: Layout
    config: Config
    architecture: Architecture
    path: Path
    stacked: bool  # all layers in one tensor, as Megatron-LM saves them
    input_ids: Tensor
    out: Path


def write_logprobs(reading: Reading) -> None:
    """Write what this rank has of `WholeVocabulary.whole_logprobs`, a file per rank; every rank of
    the layout runs this.
    """
    with parallel.joined(reading.layout, seed=reading.config.seed):
        actor = WholeVocabulary(
            reading.architecture, reading.config, reading.path, stacked=reading.stacked
        )
        found = actor.whole_logprobs(reading.input_ids)
        if mpu.get_tensor_model_parallel_rank() == 0 and len(found["at"]):
            save_file(found, reading.out / f"{dist.get_rank()}.safetensors")
        dist.barrier()
