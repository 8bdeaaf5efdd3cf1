"""Strategic grams as files: a text file with one a line, or YAML with what is known of each.

::

    # text: `#` begins a comment
    let me check whether

    # YAML: as tools/mine_strategic_grams.py writes it; only `grams` is needed, and of each `gram`
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
_WAY_OUT = "write one a line, e.g. let me check whether, or as YAML: grams: [{gram: ...}]"


def read_grams(path: Path) -> list[str]:
    """The grams in the file, at least one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "give a file of strategic grams") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    grams = _from_yaml(path, text) if path.suffix in YAML else [line for line in lines if line]
    if not grams:
        raise InputError(str(path), "holds no grams", _WAY_OUT)
    return grams


def _from_yaml(path: Path, text: str) -> list[str]:
    try:
        content: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        reason = f"is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(str(path), reason, "quote or correct it") from None
    rows = content.get("grams") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(str(path), "has no list of grams", _WAY_OUT)
    return [_gram(f"{path}: gram {place}", row) for place, row in enumerate(rows, start=1)]


def _gram(where: str, row: Any) -> str:
    gram = row.get("gram") if isinstance(row, dict) else row
    if not isinstance(gram, str) or not gram.strip():
        raise InputError(where, f"{gram!r} is not text", "quote or delete it")
    return gram
