"""Where in a torch_dist checkpoint is each unit of the model, and is it of the shape that it should
be?

Our checkpoints have a key per layer; Megatron-LM's own have one tensor for all layers, which adds a
leading axis. Experts share a tensor in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.mcore.hf_weights import VOCABULARY, Row, Unit, unit_rows, units
from megatron_bupo.mcore.torch_dist import Shape, key_names, key_prefix
from megatron_bupo.mcore.torch_dist_reader import TorchDist

ALL_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Source:
    """A parameter: the tensor `key` at the leading indices `at`."""

    key: str
    at: Shape


def locate(checkpoint: TorchDist, arch: Architecture) -> dict[Unit, dict[str, Source]]:
    """Unit -> first HF name of a row -> where it is, for all units but the layers above those that
    the checkpoint has.

    Raises:
        InputError: something else is missing, there is more than `arch` has, or shapes differ.
    """
    shapes = expected_tensors(arch)
    found: dict[Unit, dict[str, Source]] = {}
    missing: list[str] = []
    absent: list[Unit] = []
    for unit in units(arch):
        rows = unit_rows(unit, arch, ep=1)
        sources = {row.hf[0]: _source(checkpoint, unit, row) for row in rows}
        if unit.startswith("layer ") and not any(sources.values()):
            absent.append(unit)
            continue
        if absent and unit.startswith("layer "):  # a gap, not the top
            missing += [key_prefix(lower) for lower in absent]
        missing += [_usual_key(unit, row) for row in rows if sources[row.hf[0]] is None]
        found[unit] = {name: source for name, source in sources.items() if source}
        for row in rows:
            if source := sources[row.hf[0]]:
                _check_shape(checkpoint, source, _shape(row, shapes), row)
    if missing or "layer 1" in absent:
        named = _listed(missing or [key_prefix("layer 1")])
        reason = "config.json asks for it, the checkpoint does not hold it"
        raise InputError(f"{checkpoint.path}: {named}", reason, "use the config.json of this model")
    _refuse_unexpected(checkpoint, arch, found)
    return found


def absent_units(found: Mapping[Unit, object], arch: Architecture) -> list[Unit]:
    """The layers above those that were found."""
    return [unit for unit in units(arch) if unit not in found]


def check_padding(
    checkpoint: TorchDist, found: Mapping[Unit, Mapping[str, Source]], arch: Architecture
) -> None:
    """Rows of ours beyond the vocabulary are zero: else they are tokens that config.json does not
    know. Megatron-LM's may hold anything.
    """
    for unit in ("embedding", "unembedding"):
        for source in found.get(unit, {}).values():
            rows = checkpoint.shape(source.key)[0]
            if rows == arch.vocab_size or any(map(_is_stacked, found["layer 1"].values())):
                continue
            if checkpoint.read(source.key)[arch.vocab_size :].any():
                raise InputError(
                    f"{checkpoint.path}: {source.key}",
                    f"has {rows} rows, but config.json says vocab_size={arch.vocab_size}, and what "
                    "follows is not padding",
                    "use the config.json of this model",
                )


def _source(checkpoint: TorchDist, unit: Unit, row: Row) -> Source | None:
    """Where `row` of `unit` is; None: nowhere."""
    expert = () if row.expert is None else (row.expert,)
    for name in key_names(row):
        if (key := key_prefix(unit) + name) in checkpoint:
            return Source(key, expert)
    if unit.startswith("layer "):
        layer = int(unit.split()[1]) - 1
        for name in key_names(row):
            key = ALL_LAYERS + name
            if key in checkpoint and layer < checkpoint.shape(key)[0]:
                return Source(key, (layer, *expert))
    return None


def _usual_key(unit: Unit, row: Row) -> str:
    return key_prefix(unit) + key_names(row)[0]


def _shape(row: Row, shapes: Mapping[str, Shape]) -> Shape:
    """Of the parameter that tensors of `shapes` make up."""
    first, *more = (shapes[name] for name in row.hf)
    return (first[0] + sum(shape[0] for shape in more), *first[1:])


def _check_shape(checkpoint: TorchDist, source: Source, expected: Shape, row: Row) -> None:
    stored = checkpoint.shape(source.key)
    found = stored[len(source.at) :]
    if row in VOCABULARY and len(found) == 2 and found[0] >= expected[0]:
        found = (expected[0], found[1])  # rows of padding follow
    if found != expected or any(i >= n for i, n in zip(source.at, stored, strict=False)):
        raise InputError(
            f"{checkpoint.path}: {source.key}",
            f"has shape {list(stored)}, of which config.json asks for {list(expected)}"
            + (f" at {list(source.at)}" if source.at else ""),
            "use the config.json of this model",
        )


def _refuse_unexpected(
    checkpoint: TorchDist, arch: Architecture, found: Mapping[Unit, Mapping[str, Source]]
) -> None:
    """Nothing of the model is left over: no key, no layer, no expert."""
    used = {source.key for sources in found.values() for source in sources.values()}
    if unexpected := [key for key in checkpoint.keys if key not in used]:
        raise InputError(
            f"{checkpoint.path}: {_listed(unexpected)}",
            f"no place for it in the {arch.layers}-layer {arch.family} model of config.json",
            "use the config.json of this model",
        )
    for sources in found.values():
        for source in sources.values():
            stored = checkpoint.shape(source.key)
            axes = [arch.layers] if _is_stacked(source) else []
            axes += [arch.experts.number] if arch.experts and _is_expert(source) else []
            if list(stored[: len(source.at)]) != axes:
                raise InputError(
                    f"{checkpoint.path}: {source.key}",
                    f"has shape {list(stored)}, but config.json gives {axes} of them",
                    "use the config.json of this model",
                )


def _is_stacked(source: Source) -> bool:
    return source.key.startswith(ALL_LAYERS) and not source.key[len(ALL_LAYERS)].isdigit()


def _is_expert(source: Source) -> bool:
    return ".experts.experts." in source.key


def _listed(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def read_row(
    row: Row, source: Source, checkpoint: TorchDist, arch: Architecture
) -> dict[str, Tensor]:
    """HF name -> tensor, of those that the parameter at `source` is made of."""
    parameter = checkpoint.read(source.key, source.at)
    if row in VOCABULARY:
        parameter = parameter[: arch.vocab_size]  # above: padding
    return dict(zip(row.hf, row.split(parameter, arch), strict=True))
