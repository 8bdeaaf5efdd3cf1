"""One process writes the torch_dist checkpoint that the ranks of a layout would have written, and
ranks of another layout load it.
"""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.cli import main
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.mcore.torch_dist import METADATA
from megatron_bupo.mcore.torch_dist_reader import COMMON_STATE
from megatron_bupo.mcore.weight_stream import trained_units
from tests.mcore.actors import run_config
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from megatron_bupo.config.schema import Config

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TP2_PP2 = {"tp": 2, "pp": 2}
VPP2 = {"pp": 2, "vpp": 2}
TP2_EP2 = {"tp": 2, "ep": 2, "sp": True, "dp": 2}
UNEVEN = {"num_layers_in_first_pipeline_stage": 1}
SPARSE = {"family": "qwen3_moe", "mlp_only_layers": [1], "layers": 3}
CASES = {
    "TP2 PP2, qwen3": ({"family": "qwen3"}, 4, TP2_PP2, {}),
    "TP4, qwen2 tied": ({"family": "qwen2", "tied": True, "kv_heads": 4}, 4, {"tp": 4}, {}),
    "PP2 VPP2, llama with biases, tied": (
        {"family": "llama", "bias": True, "tied": True},
        2,
        VPP2,
        {},
    ),
    "PP2 of 1 + 3 layers, CP2, qwen3": ({"family": "qwen3"}, 4, {"pp": 2, "cp": 2}, UNEVEN),
    "TP2 EP2, some layers dense": (SPARSE, 4, TP2_EP2, {}),
    "TP2 EP2 ETP1": ({"family": "qwen3_moe"}, 2, {**TP2_EP2, "dp": None, "etp": 1}, {}),
    "CP2 EP2": ({"family": "qwen3_moe"}, 2, {"cp": 2, "ep": 2}, {}),
}


def _actor(
    model_dir: Path, config: Config, metadata: dict[str, Any] = METADATA
) -> tuple[MegatronActor, dict[str, Any]]:
    """The model on this rank, and what it saves and loads."""
    parallel.initialize(parallel_sizes(config, dist.get_world_size()), seed=0)
    with ExitStack() as files:
        open_slice = slice_opener(read_index(model_dir), files)
        actor = MegatronActor(read_architecture(model_dir), config, open_slice)
    state = {
        f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata))
        for i, chunk in enumerate(actor.gpt_chunks)
    }
    return actor, state


def _save(model_dir: Path, config: Config, out: Path, metadata: dict[str, Any]) -> None:
    _, state = _actor(model_dir, config, metadata)
    with checkpoint._writing_in_this_process():
        dist_checkpointing.save(state, str(out), **checkpoint._release_options())


def _load(model_dir: Path, config: Config, path: Path) -> dict[str, Tensor]:
    """All weights, after the checkpoint at `path` has taken the place of others."""
    actor, state = _actor(model_dir, config)
    for chunk in actor.gpt_chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)
    loaded: Any = dist_checkpointing.load(state, str(path))
    for i, chunk in enumerate(actor.gpt_chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)
    stream = actor.weights.tensors(trained_units(FULL, actor.arch))
    return {name: tensor.to("cpu", copy=True) for name, tensor in stream}


def _content(path: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """`(key -> shape and dtype, (key, offsets) -> rank, chunk's shape, bytes)`."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    tensors, chunks = {}, {}
    for key, tensor in metadata.state_dict_metadata.items():
        if key == COMMON_STATE:  # as 0.19 writes what we, for older ones too, write to common.pt
            continue
        if hasattr(tensor, "chunks"):
            tensors[key] = tuple(tensor.size), tensor.properties
            chunks |= {(key, tuple(c.offsets)): tuple(c.sizes) for c in tensor.chunks}
        else:
            tensors[key] = None
    stored = {}
    for index, place in metadata.storage_data.items():
        if index.fqn == COMMON_STATE:
            continue
        at = (index.fqn, index.offset and tuple(index.offset))
        data = (path / place.relative_path).read_bytes()
        rank = place.relative_path.split("_")[2]
        part = data[place.offset : place.offset + place.length]
        stored[at] = rank, chunks.get(at), part
    return tensors, stored


def _convert(model_dir: Path, out: Path, *layout: str) -> None:
    assert (
        main(["convert", "hf-to-megatron", "--hf", str(model_dir), "--out", str(out), *layout]) == 0
    )


@pytest.mark.parametrize(("knobs", "ranks", "layout", "megatron"), CASES.values(), ids=CASES)
def test_it_is_what_the_ranks_of_that_layout_save(
    knobs: dict[str, Any],
    ranks: int,
    layout: dict[str, Any],
    megatron: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    model_dir, theirs = tiny_model_dir(vocab=67, **knobs), tmp_path / "theirs"
    theirs.mkdir()
    config = run_config(parallel=layout, megatron=megatron)
    run_ranks(ranks, _save, model_dir, config, theirs, METADATA)
    given = [f"parallel.{key}={json_of(value)}" for key, value in layout.items()]
    given += [f"megatron.{key}={value}" for key, value in megatron.items()]
    _convert(model_dir, tmp_path / "ours", *given)
    ours, saved = _content(tmp_path / "ours"), _content(theirs)
    assert ours[0] == saved[0]
    assert ours[1] == saved[1]


def json_of(value: Any) -> str:
    return "null" if value is None else str(value).lower()


@pytest.mark.parametrize(
    ("knobs", "given", "ranks", "other"),
    [
        pytest.param({"family": "qwen3"}, ["parallel.tp=2", "parallel.pp=2"], 2, VPP2, id="dense"),
        pytest.param({"family": "qwen2", "tied": True}, ["parallel.pp=4"], 2, {"tp": 2}, id="tied"),
        pytest.param(SPARSE, ["parallel.ep=4"], 4, TP2_EP2, id="experts"),
    ],
)
def test_another_layout_loads_it(
    knobs: dict[str, Any],
    given: list[str],
    ranks: int,
    other: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    model_dir, path = tiny_model_dir(vocab=67, **knobs), tmp_path / "torch_dist"
    _convert(model_dir, path, *given)
    assert dist_checkpointing.load_content_metadata(str(path)) == METADATA
    stored = load_file(model_dir / "model.safetensors")
    for weights in run_ranks(ranks, _load, model_dir, run_config(parallel=other), path):
        assert weights.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_that_megatron_lm_has_in_one_tensor_come_apart(
    family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir, theirs = tiny_model_dir(vocab=67, family=family), tmp_path / "theirs"
    (theirs / "iter_0000007").mkdir(parents=True)
    (theirs / "latest_checkpointed_iteration.txt").write_text("7")
    config = run_config(parallel={"tp": 2, "pp": 2, "sp": True})
    run_ranks(4, _save, model_dir, config, theirs / "iter_0000007", {})
    out = tmp_path / "hf"
    command = ["convert", "megatron-to-hf", "--megatron", theirs, "--out", out, "--like", model_dir]
    assert main([str(word) for word in command]) == 0
    before, after = (d / "model.safetensors" for d in (model_dir, out))
    assert after.read_bytes() == before.read_bytes()
