"""Are two checkpoints the same model? Every tensor by its HF name, what config.json says, the
tokenizer's files, and what both compute.

Tensors are read one at a time, and equal means bit-equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.verification.logprobs import (
    Computed,
    Question,
    compared_logprobs,
    not_computable,
)
from megatron_bupo.verification.sides import Side

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
WRITTEN_BY_CHANCE = {"transformers_version", "_name_or_path", "_from_model_config"}
NUMBERS_AT_A_TIME = 2**22
SEVERITY = ("missing", "shape", "config", "logprobs", "values", "dtype", "file")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both; `name` is a tensor, a key or a file."""

    kind: str  # one of SEVERITY
    name: str
    first: str
    second: str
    largest: float | None = None  # largest absolute difference of values


@dataclass(frozen=True)
class Report:
    """What the comparison found; differences come worst first."""

    tensors: int  # compared
    differences: tuple[Difference, ...]
    computed: Computed | None  # None: not asked for, or could not be
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Nothing differs."""
        return not self.differences


def compare(first: Side, second: Side, question: Question | None) -> Report:
    """Compare everything; what the models compute where there is a `question`."""
    differences = [
        *config_differences(first, second),
        *file_differences(first.files, second.files),
        *tensor_differences(first, second),
    ]
    told = any(difference.kind == "config" for difference in differences)
    notes, computed = [] if told else config_notes(first, second), None
    if question is not None:
        obstacles = [*not_computable(first, second)]
        notes += [f"log-probs were not compared: {obstacle}" for obstacle in obstacles]
        if not obstacles:
            computed = compared_logprobs(first, second, question)
            differences += logprob_difference(computed)
    differences.sort(key=_worst_first)
    return Report(
        len(first.tensors.keys() & second.tensors), tuple(differences), computed, tuple(notes)
    )


def _worst_first(difference: Difference) -> tuple[int, float]:
    return SEVERITY.index(difference.kind), -(difference.largest or 0.0)


def config_differences(first: Side, second: Side) -> Iterator[Difference]:
    """Facts of the model in which the two config.json (and generation_config.json) disagree."""
    ours, theirs = asdict(first.architecture), asdict(second.architecture)
    for name, value in ours.items():
        if value != theirs[name]:
            yield Difference("config", name, str(value), str(theirs[name]))


def config_notes(first: Side, second: Side) -> list[str]:
    """Other keys of config.json in which they disagree, and which no model computes with."""
    ours, theirs = (_read_file(side.files / "config.json") for side in (first, second))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    listed = ", ".join(keys)
    return [f"config.json differs in {listed}, by name or in what is not read"] if keys else []


def file_differences(first: Path, second: Path) -> Iterator[Difference]:
    """Files of tokenizer and generation that are not the same; JSON by what it says."""
    for name in SIDE_FILES:
        there = [(folder / name).exists() for folder in (first, second)]
        if all(there) and _read_file(first / name) != _read_file(second / name):
            yield Difference("file", name, "", "another content")
        elif any(there) and not all(there):
            yield Difference("file", name, *_whether(*there))


def _whether(first: bool, second: bool) -> tuple[str, str]:
    return "there" if first else "missing", "there" if second else "missing"


def _read_file(path: Path) -> Any:
    content = path.read_bytes()
    try:
        found = json.loads(content) if path.suffix == ".json" else content
    except (ValueError, RecursionError):
        return content
    if isinstance(found, dict):
        return {key: value for key, value in found.items() if key not in WRITTEN_BY_CHANCE}
    return found


def tensor_differences(first: Side, second: Side) -> Iterator[Difference]:
    """Tensors that are not bit-equal, or are not in both."""
    for name in {**first.tensors, **second.tensors}:
        ours, theirs = first.tensors.get(name), second.tensors.get(name)
        if ours is None or theirs is None:
            yield Difference("missing", name, *_whether(ours is not None, theirs is not None))
        elif ours.shape != theirs.shape:
            yield Difference("shape", name, str([*ours.shape]), str([*theirs.shape]))
        else:
            a, b = first.read(name), second.read(name)
            if a.dtype != b.dtype:
                yield Difference("dtype", name, ours.dtype, theirs.dtype)
            unequal, largest = largest_difference(a, b)
            if unequal:
                numbers = f"{unequal} of {a.numel()} numbers differ"
                yield Difference("values", name, "", numbers, largest)


def largest_difference(a: Tensor, b: Tensor) -> tuple[int, float]:
    """How many numbers of two tensors of one shape differ, and the largest difference.

    Of one dtype they differ by their bits, so that a NaN equals itself and 0 is not -0. A number
    that is NaN on one side alone is infinitely far.
    """
    unequal, largest = 0, 0.0
    pieces = (t.contiguous().flatten().split(NUMBERS_AT_A_TIME) for t in (a, b))
    for x, y in zip(*pieces, strict=True):
        other = x != y if x.dtype != y.dtype else _bits(x) != _bits(y)
        if not other.any():
            continue
        unequal += int(other.sum())
        gap = (x[other].double() - y[other].double()).abs()
        largest = max(largest, float(gap.nan_to_num(math.inf, math.inf).max()))
    return unequal, largest


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.dtype.itemsize])


def logprob_difference(computed: Computed) -> Iterator[Difference]:
    """The difference that log-probs too far apart are."""
    if computed.largest_relative > computed.tolerance:
        what = f"{computed.largest_relative:.1e} of the largest log-prob of the position"
        allowed = f"allowed is {computed.tolerance:.1e}"
        yield Difference("logprobs", "the whole vocabulary", what, allowed, computed.largest_nats)
