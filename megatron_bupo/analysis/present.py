"""A finished analysis for people: figures and a page, from the files in its directory alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bupo.analysis.figures import draw_figures
from megatron_bupo.analysis.report import write_report
from megatron_bupo.analysis.results import RESULTS
from megatron_bupo.errors import InputError

LENS = "lens.json"  # ../logit_lens.py writes it


def present(out: Path) -> list[Path]:
    """Draw and write all of it; what people are to open, the page first."""
    content = _read_results(out)
    try:
        figures = draw_figures(out, content)
        return [write_report(out, content, read_lens(out)), *figures]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        reason = f"is not what an analysis writes ({type(error).__name__}: {error})"
        raise InputError(str(out / RESULTS), reason, "analyze again, with --model") from error
    except OSError as error:
        reason = f"cannot be written to ({error})"
        raise InputError(f"--out {out}", reason, "choose another --out") from None


def read_lens(out: Path) -> dict[str, Any] | None:
    """The tokens of the layers, if they are there."""
    try:
        content = json.loads((out / LENS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and isinstance(content.get("responses"), list)
    return content if whole else None


def _read_results(out: Path) -> dict[str, Any]:
    path = out / RESULTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        reason = f"holds no {RESULTS}: no analysis has finished there"
        raise InputError(f"--out {out}", reason, "give --model, to make one") from None
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be read ({error})"
        raise InputError(str(path), reason, "analyze again, with --model") from None
