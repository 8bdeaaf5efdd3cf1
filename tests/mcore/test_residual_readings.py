"""Every number that is read at every layer beside transformers with hooks, under every layout."""

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
from megatron_bupo.mcore.residual_readings import ResidualReader
from tests.dense import dense_model
from tests.dense_readings import dense_readings
from tests.mcore.actors import random_batch, run_config
from tests.mcore.parity_cases import LLAMA, MOE, QWEN2, QWEN3, RECOMPUTE, SPARSE
from tests.ranks import run_ranks

TOLERANCE = 1e-4
# Half of the rows are one response's: logits of 13 rows hold two tokens, and micro-batches are many
SMALL = {"trainer": {"logprob_chunk_tokens": 13, "max_tokens_per_microbatch": 24}}


def readings(model_dir: Path, world: int, *, normed: bool = False, **sections: Any) -> list[Any]:
    """What each rank reads: columns by name."""
    return run_ranks(world, _read, model_dir, normed, sections)


def _read(model_dir: Path, normed: bool, sections: dict[str, Any]) -> dict[str, Tensor]:
    config = run_config(**SMALL | sections)
    parallel.initialize(parallel_sizes(config, torch.distributed.get_world_size()), seed=0)
    arch = read_architecture(model_dir)
    assert isinstance(arch, Architecture)
    with ExitStack() as files:
        opener = slice_opener(read_index(model_dir), files)
        reader = ResidualReader(arch, config, opener, normed=normed)
    found = reader.read(random_batch())
    return found.of_layers() | found.of_model()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        gap = (found[name].double() - values).abs().max()
        assert gap < TOLERANCE, f"{name}: {gap}"


CASES = {
    "qwen3, one rank": (QWEN3, 1, {}),
    "qwen2, tp2": (QWEN2, 2, {"parallel": {"tp": 2}}),
    "llama, pp2": (LLAMA | {"bias": True}, 2, {"parallel": {"pp": 2}}),
    "tied qwen3, tp2 pp2 sp": (
        QWEN3 | {"tied": True},
        4,
        {"parallel": {"tp": 2, "pp": 2, "sp": True}},
    ),
    "llama, cp2 dp2, recompute": (LLAMA, 4, {"parallel": {"cp": 2}, "megatron": RECOMPUTE}),
    "experts, pp2 vpp2": (MOE | SPARSE, 2, {"parallel": {"pp": 2, "vpp": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_readings_are_those_of_transformers_under_every_layout(
    tiny_model_dir: Callable[..., Path], case: str
):
    model, world, sections = CASES[case]
    model_dir = tiny_model_dir(**model)
    expected = dense_readings(dense_model(model_dir), random_batch())
    for found in readings(model_dir, world, **sections):
        assert_equal(found, expected)


def test_the_normed_read_out_puts_the_final_norm_before_the_unembedding(
    tiny_model_dir: Callable[..., Path],
):
    model_dir = tiny_model_dir(**QWEN3)
    expected = dense_readings(dense_model(model_dir), random_batch(), normed=True)
    (found,) = readings(model_dir, 1, normed=True)
    assert_equal(found, expected)
    last = {name: values[-1] for name, values in found.items() if values.ndim == 2}
    assert torch.allclose(last["entropy_nats"], found["full_entropy_nats"], atol=1e-5)
    assert last["kl_to_full_nats"].abs().max() < 1e-5
    assert last["top1_agreement"].eq(1).all()


def test_bfloat16_strays_no_further_than_transformers_own(tiny_model_dir: Callable[..., Path]):
    model_dir, batch = tiny_model_dir(**QWEN3), random_batch()
    rounded = dense_model(model_dir, torch.bfloat16)
    own = dense_readings(rounded, batch)
    exact = dense_readings(rounded.float(), batch)
    sections = {"model": {"dtype": "bfloat16"}, "parallel": {"tp": 2, "pp": 2, "sp": True}}
    for found in readings(model_dir, 4, **sections):
        for name, values in exact.items():
            if "top1" not in name:  # of which ties in bfloat16 make a whole
                allowed = 2 * (own[name] - values).abs().max()
                assert (found[name].double() - values).abs().max() < allowed, name
