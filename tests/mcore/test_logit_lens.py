"""The tokens that every layer would have said, beside transformers, under layouts that cut both
vocabulary and layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.logit_lens import LensReader
from tests.dense import dense_model
from tests.dense_readings import dense_readings
from tests.mcore.actors import random_batch, run_config
from tests.mcore.parity_cases import LLAMA, QWEN3
from tests.ranks import run_ranks

TOP = 3
SMALL = {"trainer": {"logprob_chunk_tokens": 13, "max_tokens_per_microbatch": 24}}


def _lens(model_dir: Path, sections: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    config = run_config(**SMALL | sections)
    parallel.initialize(parallel_sizes(config, torch.distributed.get_world_size()), seed=0)
    arch = read_architecture(model_dir)
    assert isinstance(arch, Architecture)
    with ExitStack() as files:
        reader = LensReader(arch, config, slice_opener(read_index(model_dir), files))
    return {name: vars(lens) for name, lens in reader.lens(random_batch(), top=TOP).items()}


@torch.no_grad()
def _dense(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Log-probs `[layers, tokens, vocab]` of both read-outs, and the response tokens."""
    batch, parts, targets = random_batch(), {"raw": [], "norm": []}, []
    streams: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out))
    for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True):
        before = mask.nonzero().flatten() - 1
        streams.clear()
        model.model(ids[None])
        h = torch.stack([stream[0][before] for stream in streams])
        for name, x in (("raw", h), ("norm", model.model.norm(h))):
            parts[name].append(model.lm_head(x).double().log_softmax(-1))
        targets.append(ids[before + 1])
    return {name: torch.cat(of, dim=1) for name, of in parts.items()}, torch.cat(targets)


@pytest.mark.parametrize(
    ("model", "world", "sections"),
    [
        (LLAMA, 2, {"parallel": {"tp": 2}}),
        (QWEN3 | {"tied": True}, 4, {"parallel": {"tp": 2, "pp": 2, "sp": True}}),
    ],
    ids=["llama, tp2", "tied qwen3, tp2 pp2 sp"],
)
def test_the_best_tokens_of_each_layer_are_those_of_transformers(
    tiny_model_dir: Callable[..., Path], model: dict[str, Any], world: int, sections: dict[str, Any]
):
    model_dir = tiny_model_dir(**model)
    dense = dense_model(model_dir)
    readings = dense_readings(dense, random_batch())
    logprobs, targets = _dense(dense)
    for found in run_ranks(world, _lens, model_dir, sections):
        for (name, lens), prefix in zip(found.items(), ("", "normed_"), strict=True):
            probs, ids = logprobs[name].exp().topk(TOP)
            assert torch.equal(lens["token_ids"], ids)
            assert (lens["probs"] - probs).abs().max() < 1e-5
            of_target = logprobs[name].gather(2, targets.expand(len(ids), -1)[..., None])
            assert torch.equal(lens["rank"], 1 + (logprobs[name] > of_target).sum(-1))
            for column, key in (("entropy", "entropy_nats"), ("kl_to_full", "kl_to_full_nats")):
                assert (lens[column] - readings[prefix + key]).abs().max() < 1e-4
