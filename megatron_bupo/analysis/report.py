"""The analysis as one page, `report.html`. The file of that name beside this one is the page, this
fills in `analysis.json` and the tokens of the layers (`lens.json`) as they are; whatever the page
shows is computed from those two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.durable import replace_text
from megatron_bupo.pages.fill import fill

FILE = "report.html"
_TEMPLATE = Path(__file__).with_suffix(".html")


def write_report(out: Path, content: Mapping[str, Any], lens: Mapping[str, Any] | None) -> Path:
    """Write `out`/report.html."""
    page = fill(_TEMPLATE, content["model"], {"analysis": content, "lens": lens})
    replace_text(out / FILE, page)
    return out / FILE
