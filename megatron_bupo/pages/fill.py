"""A template into a page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def fill(template: Path, title: str, data: Mapping[str, Any]) -> str:
    """The page of `template` under `title`, with each of `data` as JSON under its name as an id.

    Infinities and NaN are no JSON: give None instead.
    """
    page = template.read_text(encoding="utf-8")
    for mark, text in (
        ("/*STYLE*/", (HERE / "style.css").read_text(encoding="utf-8")),
        ("/*DRAW*/", (HERE / "draw.js").read_text(encoding="utf-8")),
        ("<!--TITLE-->", html.escape(title)),
        ("<!--DATA-->", "\n".join(_element(name, value) for name, value in data.items())),
    ):
        page = page.replace(mark, text)
    return page


def _element(name: str, value: Any) -> str:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # or "</script>" in a text would end the data
    return f'<script type="application/json" id="{name}">{text}</script>'
