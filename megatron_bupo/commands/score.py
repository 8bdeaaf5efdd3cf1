"""`megatron-bupo score`: what a policy thinks of responses that are given, under any layout.

Rows are token ids, so no tokenizer stands between the question and the answer.
"""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.config import expand, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.launch.local import run_ranks, under_torchrun
from megatron_bupo.preflight import Preflight, check_model

EXAMPLE = 'write {"input_ids": [4, 10, 9, 11, 1], "prompt_length": 4}'


@dataclass(frozen=True)
class GivenResponse:
    """Token ids of a prompt with a response, which begins at `prompt_length`."""

    input_ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Scoring:
    """Everything that scoring needs: responses in order, the policy to ask, the file to write."""

    ready: Preflight
    policy: Policy
    responses: tuple[GivenResponse, ...]
    out: Path


def run(args: Namespace) -> None:
    """Score `--data` under `--policy`."""
    scoring = read_scoring(args)
    from megatron_bupo.score import score

    run_ranks(score, scoring.ready.layout.world, scoring)


def read_scoring(args: Namespace) -> Scoring:
    """The command line with the files that it names, checked."""
    config = load_config(None, [f"model.path={json.dumps(args.model)}", *args.overrides])
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    layout = check(config, world_size, training=False)
    architecture = check_model(config, training=False)
    if config.megatron:
        from megatron_bupo.mcore.native import check_native

        check_native(config.megatron)
    policy = read_policy(args.policy, architecture.layers, read_out_norm=args.read_out_norm)
    responses = read_responses(Path(expand(args.data)), architecture)
    out = Path(expand(args.out))
    if not out.parent.is_dir():
        raise InputError(f"--out {args.out}", f"{out.parent} is not a directory", "make it first")
    return Scoring(Preflight(config, architecture, layout), policy, responses, out)


def read_policy(text: str, layers: int, *, read_out_norm: bool) -> Policy:
    """`full` or `layer=N` of a model with `layers` layers."""
    where = f"--policy {text}"
    if text == "full":
        if read_out_norm:
            reason = "the full policy is always read out through the final norm"
            raise InputError("--read-out-norm", reason, "leave it out, or ask for --policy layer=N")
        return FULL
    match = re.fullmatch(r"layer=(\d+)", text)
    if match is None:
        raise InputError(
            where, "is not a policy", f"write full, or layer=N with N in 1..{layers - 1}"
        )
    layer = int(match[1])
    if layer == layers:
        reason = f"is the last layer of a {layers}-layer model, whose policy is the full policy"
        raise InputError(where, reason, f"choose full, or layer=1..{layers - 1}")
    if not 1 <= layer < layers:
        raise InputError(where, f"the model has {layers} layers", f"choose 1..{layers - 1}")
    return InternalLayerPolicy(layer, read_out_norm)


def read_responses(path: Path, architecture: DecoderSizes) -> tuple[GivenResponse, ...]:
    """The rows of the JSONL file `path`; blank lines are passed over."""
    try:
        # Not splitlines(): strings in JSON may hold U+2028 and U+0085
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "give a JSONL file") from None
    rows = tuple(
        _response(f"{path}: line {number}", line, architecture)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not rows:
        raise InputError(str(path), "has no rows", EXAMPLE)
    return rows


def _response(where: str, line: str, architecture: DecoderSizes) -> GivenResponse:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"is not JSON ({error})", EXAMPLE) from None
    if isinstance(row, dict) and {"input_ids", "response_ids"} <= row.keys():  # as they are dumped
        prompt, response = row["input_ids"], row["response_ids"]
        if isinstance(prompt, list) and isinstance(response, list):
            row = {"input_ids": prompt + response, "prompt_length": len(prompt)}
    if not (isinstance(row, dict) and {"input_ids", "prompt_length"} <= row.keys()):
        raise InputError(where, "is not an object with input_ids and prompt_length", EXAMPLE)
    ids, length = row["input_ids"], row["prompt_length"]
    if not (isinstance(ids, list) and all(map(_is_int, ids)) and _is_int(length)):
        reason = "input_ids must be a list of integers and prompt_length an integer"
        raise InputError(where, reason, EXAMPLE)
    if wrong := [i for i in ids if not 0 <= i < architecture.vocab_size]:
        reason = f"token id {wrong[0]} is outside the vocabulary"
        raise InputError(where, reason, f"use ids in 0..{architecture.vocab_size - 1}")
    if not 1 <= length <= len(ids):
        reason = f"prompt_length={length} of {len(ids)} tokens"
        raise InputError(where, reason, f"choose 1..{len(ids)}: a first token has no log-prob")
    if len(ids) > architecture.max_positions:
        reason = f"{len(ids)} tokens exceed the model's {architecture.max_positions} positions"
        raise InputError(where, reason, "shorten the row")
    return GivenResponse(tuple(ids), length)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
