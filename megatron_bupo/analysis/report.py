"""The analysis as one page, `report.html`, with all that it needs inside: no network, no scripts
but its own. `report.html` beside this file is the page, this fills in `analysis.json` and the
tokens of the layers (`tokens.py`) as they are; whatever the page shows is computed from those two.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.durable import replace_text

FILE = "report.html"
_TEMPLATE = Path(__file__).with_suffix(".html")


def write_report(out: Path, content: Mapping[str, Any], lens: Mapping[str, Any] | None) -> Path:
    """Write `out`/report.html."""
    page = _TEMPLATE.read_text(encoding="utf-8")
    data = "\n".join(_data(name, value) for name, value in (("analysis", content), ("lens", lens)))
    title = html.escape(content["model"])
    page = page.replace("<!--TITLE-->", title).replace("<!--DATA-->", data)
    replace_text(out / FILE, page)
    return out / FILE


def _data(name: str, value: Any) -> str:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # or "</script>" in a token would end the data
    return f'<script type="application/json" id="{name}">{text}</script>'
