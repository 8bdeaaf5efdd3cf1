"""What came of an analysis: `analysis.json` for people and programs, `layers.parquet` for tables.

::

    {"model": "Qwen3-4B",
     "data": {"responses": 100, "tokens": 48211, "source": "math500.jsonl", "sampled": true},
     "read_out": "raw",
     "confidence": 0.95,
     "layers": [{"layer": 1,                           counted from 1
                 "entropy_nats": 1.47,                 means over all response tokens, pooled
                 "attention_entropy_change_nats": ...,
                 "ffn_entropy_change_nats": ..., "layer_entropy_change_nats": ..., ...
                 "standard_deviation": {"entropy_nats": ...},         over tokens
                 "standard_error": {"entropy_nats": ...},             of the mean, by response
                 "interval": {"entropy_nats": [low, high]}}, ...],
     "full_policy": {"entropy_nats": ..., "logprob_nats": ..., "perplexity": ..., ...},
     "embedding": {"entropy_nats": ..., ...},
     "read_outs": {...}, "settings": {...}, "versions": {...}}

What the names mean stands in algorithm/entropy_flow.py. Those that begin with `normed_` are read
through the final norm whatever `read_out` is: of the last layer that is the full policy, and raw it
is not. null: too few responses to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bupo.analysis.moments import Pooled
from megatron_bupo.durable import replace_text, replacing

RESULTS, TABLE = "analysis.json", "layers.parquet"
READ_OUTS = {
    "raw": "softmax(E x), without the final norm: the paper's definition",
    "norm": "softmax(E norm(x)), through the final norm; of the last layer: the full policy",
}
_SPREADS = ("standard_deviation", "standard_error")


def results(
    columns: Mapping[str, Pooled], *, read_out: str, confidence: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `analysis.json`; `about` goes in as it is."""
    of_layers = {name: column for name, column in columns.items() if column.mean.ndim}
    layers = len(next(iter(of_layers.values())).mean)
    full = _of_model("full_", columns)
    full["perplexity"] = _number(np.exp(-full["logprob_nats"]))
    return {
        **about,
        "read_out": read_out,
        "read_outs": READ_OUTS,
        "confidence": confidence,
        "full_policy": full,
        "embedding": _of_model("embedding_", columns),
        "layers": [{"layer": i + 1, **_record(of_layers, i)} for i in range(layers)],
    }


def _of_model(prefix: str, columns: Mapping[str, Pooled]) -> dict[str, Any]:
    return _record(
        {
            name.removeprefix(prefix): column
            for name, column in columns.items()
            if name.startswith(prefix) and not column.mean.ndim
        },
        (),
    )


def _record(columns: Mapping[str, Pooled], at: Any) -> dict[str, Any]:
    """Means by name, and beside them what is to be known of each."""
    record: dict[str, Any] = {name: _number(column.mean[at]) for name, column in columns.items()}
    for spread in _SPREADS:
        record[spread] = {name: _number(getattr(c, spread)[at]) for name, c in columns.items()}
    record["interval"] = {
        name: [_number(c.low[at]), _number(c.high[at])] for name, c in columns.items()
    }
    return record


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_results(out: Path, content: Mapping[str, Any]) -> None:
    """Write both files; the JSON last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(out / TABLE) as file:
        pq.write_table(pa.Table.from_pylist(list(map(_flat, content["layers"]))), file)
    replace_text(out / RESULTS, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A layer as a row: `NAME`, `NAME_standard_error`, `NAME_low`, ..."""
    row = {name: value for name, value in record.items() if not isinstance(value, dict)}
    for spread in _SPREADS:
        row |= {f"{name}_{spread}": value for name, value in record[spread].items()}
    for name, (low, high) in record["interval"].items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def table(content: Mapping[str, Any]) -> Iterator[str]:
    """A line per layer under a heading, for a terminal."""
    yield "layer   entropy   dH layer    dH attn     dH ffn   KL(l||full)   agrees"
    for layer in content["layers"]:
        yield (
            f"{layer['layer']:5}  {layer['entropy_nats']:8.3f}  "
            f"{_signed(layer, 'layer')}  {_signed(layer, 'attention')}  {_signed(layer, 'ffn')}  "
            f"{layer['kl_to_full_nats']:12.3f}  {layer['top1_agreement']:7.1%}"
        )


def _signed(layer: Mapping[str, Any], what: str) -> str:
    return f"{layer[f'{what}_entropy_change_nats']:+9.3f}"
