"""Strategic grams as files: a text file with one a line, or YAML with what is known of each.

::

    # text: `#` begins a comment
    let me check whether

    # YAML: as tools/mine_strategic_grams.py writes it; only `grams` is needed, and of each `gram`.
    # `cluster`, a number or a name, says which grams mean the same
    source: what the grams were mined from, and under which licence
    grams:
      - gram: let me check whether
        cluster: 7
        solutions: 412
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_bupo.errors import InputError

YAML = (".yaml", ".yml")
Cluster = int | str
_WAY_OUT = "write one a line, e.g. let me check whether, or as YAML: grams: [{gram: ...}]"


def read_grams(path: Path) -> list[str]:
    """The grams in the file, at least one."""
    return [gram for gram, _ in _read(path)]


def read_clusters(path: Path) -> dict[str, Cluster]:
    """The cluster of each gram in the file that has one."""
    return {gram: cluster for gram, cluster in _read(path) if cluster is not None}


def _read(path: Path) -> list[tuple[str, Cluster | None]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "give a file of strategic grams") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    rows = _rows_of(path, text) if path.suffix in YAML else [line for line in lines if line]
    if not rows:
        raise InputError(str(path), "holds no grams", _WAY_OUT)
    return [_gram(f"{path}: gram {place}", row) for place, row in enumerate(rows, start=1)]


def _rows_of(path: Path, text: str) -> list[Any]:
    try:
        content: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        reason = f"is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(str(path), reason, "quote or correct it") from None
    rows = content.get("grams") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(str(path), "has no list of grams", _WAY_OUT)
    return rows


def _gram(where: str, row: Any) -> tuple[str, Cluster | None]:
    gram, cluster = (row.get("gram"), row.get("cluster")) if isinstance(row, dict) else (row, None)
    if not isinstance(gram, str) or not gram.strip():
        raise InputError(where, f"{gram!r} is not text", "quote or delete it")
    if not isinstance(cluster, Cluster | None):
        raise InputError(where, f"cluster {cluster!r} is no number or name", "correct or delete it")
    return gram, cluster
