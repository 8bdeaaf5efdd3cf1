"""What has been read so far, on disk: a kill loses the round under way and no more.

::

    OUT/readings/000012.npz      of the responses from number 12 on: tokens, mean/NAME, squares/NAME
    OUT/tokens/000012.parquet    with --per-token, of the same: a row per token and layer

A part gets its name by one rename, when it is whole, and the parts say themselves where to go on.
Readers of parquet take the folder `tokens` for one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_bupo.analysis.moments import Array, Moments
from megatron_bupo.durable import replacing
from megatron_bupo.errors import InputError

READINGS, TOKENS = "readings", "tokens"


def add_part(out: Path, first: int, moments: Moments) -> None:
    """Keep what was read of the responses from number `first` on; on disk when this returns."""

    def save(file: IO[bytes]) -> None:
        arrays: dict[str, Any] = {"tokens": moments.tokens}
        arrays |= {f"mean/{name}": values for name, values in moments.mean.items()}
        arrays |= {f"squares/{name}": values for name, values in moments.squares.items()}
        np.savez(file, **arrays)

    _write(out / READINGS / f"{first:06d}.npz", save)


def read_parts(out: Path, lengths: Sequence[int]) -> list[Moments]:
    """All that was kept of responses of `lengths`, in order, from the first one on."""
    parts, done = [], 0
    for path in sorted((out / READINGS).glob("*.npz"), key=lambda path: path.stem.zfill(12)):
        part = _read(path)
        tokens = part.tokens.tolist()
        if path.stem != f"{done:06d}" or tokens != list(lengths[done : done + len(tokens)]):
            reason = f"is not of the responses from number {done} on"
            raise InputError(str(path), reason, "restore it, or choose another --out")
        parts.append(part)
        done += len(tokens)
    return parts


def _read(path: Path) -> Moments:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            of: dict[str, dict[str, Array]] = {"mean": {}, "squares": {}}
            for name in arrays.files:
                kind, _, column = name.partition("/")
                if column:
                    of[kind][column] = arrays[name]
            return Moments(arrays["tokens"], of["mean"], of["squares"])
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(str(path), reason, "restore it, or choose another --out") from None


def add_tokens(
    out: Path,
    first: int,
    responses: Sequence[Sequence[int]],
    of_layers: Mapping[str, Array],
    of_model: Mapping[str, Array],
) -> None:
    """Keep every number that was read at the tokens of `responses` (ids), from number `first` on:
    `of_layers` `[layers, tokens]`, `of_model` `[tokens]`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    layers = len(next(iter(of_layers.values())))
    lengths = [len(ids) for ids in responses]
    of_token = {
        "response": np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths),
        "token": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        "token_id": np.concatenate([np.array(ids, dtype=np.int32) for ids in responses]),
        **of_model,
    }
    columns = {name: np.repeat(values, layers) for name, values in of_token.items()}
    columns["layer"] = np.tile(np.arange(1, layers + 1, dtype=np.int16), sum(lengths))
    columns |= {name: values.T.ravel() for name, values in of_layers.items()}
    table = pa.table(columns)
    _write(out / TOKENS / f"{first:06d}.parquet", lambda file: pq.write_table(table, file))


def _write(path: Path, save: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        save(file)
