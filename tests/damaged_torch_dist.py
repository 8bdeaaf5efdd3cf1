"""Ways in which a torch_dist directory goes wrong, and what must be said of each; see damaged_hf.

The original is of a 2-layer model under TP2 x PP2: four files of weights.
"""

# ruff: noqa: ARG005 - a mutation takes what it may not need
from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.damaged_hf import SAME, Mutation, config, dangling, directory, removed, text, truncated

METADATA, FIRST, LAST = ".metadata", "__0_0.distcp", "__2_0.distcp"
NORM = "decoder.final_layernorm.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


class Bomb:
    """What a pickle does when it is opened: here it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def bomb(folder: Path) -> None:
    """`.metadata` that would run a command of its own."""
    (folder / METADATA).write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def metadata(change: Callable[[Any], Any]) -> Mutation:
    """`.metadata` with its object changed."""

    def mutate(folder: Path) -> None:
        found = pickle.loads((folder / METADATA).read_bytes())
        changed = change(found)
        (folder / METADATA).write_bytes(pickle.dumps(found if changed is None else changed))

    return mutate


def _tensor(key: str, **values: Any) -> Mutation:
    def change(found: Any) -> None:
        found.state_dict_metadata[key] = replace(found.state_dict_metadata[key], **values)

    return metadata(change)


def _place(key: str, **values: Any) -> Mutation:
    def change(found: Any) -> None:
        for index, place in found.storage_data.items():
            if index.fqn == key:
                found.storage_data[index] = replace(place, **values)

    return metadata(change)


def _size(*shape: int) -> Any:
    import torch

    return torch.Size(shape)


def _drop(key: str) -> Mutation:
    return metadata(lambda found: found.state_dict_metadata.__delitem__(key))


def _of(found: Any, key: str) -> Any:
    return found.state_dict_metadata[key]


def _drop_chunk(found: Any) -> None:
    found.state_dict_metadata[FC1].chunks.pop()


def _repeat_chunk(found: Any) -> None:
    chunks = found.state_dict_metadata[FC1].chunks
    chunks[1] = chunks[0]


def _forget_places(found: Any) -> None:
    for index in [index for index in found.storage_data if index.fqn == FC1]:
        del found.storage_data[index]


def _swap_files(folder: Path) -> None:
    other = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((folder / LAST).read_bytes())
    (folder / LAST).write_bytes(other)


def _zeroed(name: str) -> Mutation:
    return lambda folder: _write(folder / name, bytes((folder / name).stat().st_size))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def in_hf(mutation: Mutation) -> Mutation:
    """A mutation of the side files."""
    return lambda folder: mutation(folder / "hf")


def sealed(**run: Any) -> Mutation:
    """A training checkpoint, whose seal says `run`."""

    def mutate(folder: Path) -> None:
        sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
        (folder / "run.json").write_text(json.dumps({"files": sizes, **run}))

    return mutate


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "nothing": (lambda folder: None, SAME),
    # .metadata
    "metadata missing": (removed(METADATA), METADATA),
    "metadata empty": (text(METADATA, ""), METADATA),
    "metadata of text": (text(METADATA, "<html>"), METADATA),
    "metadata cut off": (truncated(METADATA, lambda n: n // 2), METADATA),
    "metadata without its last byte": (truncated(METADATA, lambda n: n - 1), METADATA),
    "metadata a directory": (directory(METADATA), METADATA),
    "metadata to nowhere": (dangling(METADATA), METADATA),
    "metadata a pickled list": (metadata(lambda found: [1]), METADATA),
    "metadata a bomb": (bomb, METADATA),
    "metadata of a class that is gone": (
        text(METADATA, b"cno_such_module\nNoSuchClass\n."),
        METADATA,
    ),
    "metadata without places": (metadata(lambda f: f.storage_data.clear()), "part of"),
    "metadata with places of None": (metadata(lambda f: replace(f, storage_data=None)), METADATA),
    "metadata without tensors": (metadata(lambda f: f.state_dict_metadata.clear()), "no weights"),
    # what it says of tensors
    "a tensor dropped": (_drop(NORM), NORM),
    "a layer dropped": (
        metadata(
            lambda f: [
                f.state_dict_metadata.pop(key)
                for key in list(f.state_dict_metadata)
                if key.startswith("decoder.layers.0.")
            ]
            and None
        ),
        "decoder.layers.0",
    ),
    "a tensor too many": (
        metadata(lambda f: f.state_dict_metadata.setdefault("decoder.x", _of(f, NORM)) and None),
        "decoder.x",
    ),
    "a tensor of another size": (_tensor(NORM, size=_size(33)), NORM),
    "a tensor of no size": (_tensor(NORM, size=_size()), NORM),
    "a tensor of too many axes": (_tensor(NORM, size=_size(1, 32)), METADATA),
    "a tensor of a text": (_tensor(NORM, size="32"), METADATA),
    "a tensor of the size of text": (_tensor(NORM, size=("32",)), METADATA),
    "a tensor of a dtype that is text": (_tensor(NORM, properties="float32"), METADATA),
    "a tensor without chunks": (_tensor(NORM, chunks=[]), NORM),
    "a chunk missing": (metadata(_drop_chunk), FC1),
    "a chunk twice": (metadata(_repeat_chunk), FC1),
    "no places for a tensor": (metadata(_forget_places), FC1),
    "a place outside of its file": (_place(NORM, offset=10**12), LAST),
    "a place before its file": (_place(NORM, offset=-5), NORM),
    "a place in another directory": (_place(NORM, relative_path="../" + LAST), LAST),
    "a place in no file": (_place(NORM, relative_path="__9_0.distcp"), "__9_0.distcp"),
    "a place of another tensor": (_place(NORM, offset=0), NORM),
    "a place of no bytes": (_place(NORM, length=0), NORM),
    # the files of weights
    "a file missing": (removed(LAST), LAST),
    "a file a directory": (directory(LAST), LAST),
    "a file to nowhere": (dangling(LAST), LAST),
    "a file empty": (text(FIRST, ""), FIRST),
    "a file cut in half": (truncated(FIRST, lambda n: n // 2), FIRST),
    "a file without its last byte": (truncated(FIRST, lambda n: n - 1), FIRST),
    "a file of zeros": (_zeroed(FIRST), FIRST),
    "a file of text": (text(FIRST, "<html>" * 100_000), FIRST),
    "files exchanged": (_swap_files, ".distcp"),
    "bytes behind": (lambda f: _write(f / FIRST, (f / FIRST).read_bytes() + b"0000"), SAME),
    # beside the weights: what Megatron-Core reads first
    "common empty": (text("common.pt", ""), "common.pt"),
    "metadata.json of another format": (text("metadata.json", "[]"), "metadata.json"),
    # what stands beside HF weights
    "side files missing": (lambda f: (f / "hf").rename(f / "fh") and None, "hf"),
    "config missing": (in_hf(removed("config.json")), "config.json"),
    "config cut off": (in_hf(truncated("config.json", lambda n: 40)), "config.json"),
    "config with a layer less": (in_hf(config(num_hidden_layers=1)), "decoder.layers.1"),
    "config with a layer more": (in_hf(config(num_hidden_layers=3)), "layer 3"),
    "config with another hidden size": (in_hf(config(hidden_size=64)), "shape"),
    "config with more vocabulary": (in_hf(config(vocab_size=1000)), "embedding"),
    "config with half the groups": (in_hf(config(num_key_value_heads=1)), "linear_qkv"),
    "config that is tied": (in_hf(config(tie_word_embeddings=True)), "output_layer"),
    "config of another family": (
        in_hf(config(architectures=["LlamaForCausalLM"], model_type="llama")),
        "layernorm",
    ),
    # the seal of a training checkpoint
    "seal of no run": (sealed(), "run.json"),
    "seal of a run without a model": (sealed(config={}, architecture={}), "run.json"),
    "seal with a list": (sealed(config=[], architecture=[]), "run.json"),
    "seal of another model": (
        sealed(config={"model.path": "gone"}, architecture={"layers": 7}),
        "layers",
    ),
    "seal cut off": (text("run.json", '{"files": {'), "damaged"),
    "seal of a list": (text("run.json", "[]"), "damaged"),
    "seal of sizes that are not so": (text("run.json", '{"files": {"common.pt": 1}}'), "damaged"),
    "seal of files that are gone": (text("run.json", '{"files": {"x": 1}}'), "damaged"),
    "seal deep": (text("run.json", "[" * 100_000), "damaged"),
}  # fmt: skip
