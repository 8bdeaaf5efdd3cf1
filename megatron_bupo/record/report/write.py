"""The report on disk: `report.html`, and `figures/` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.durable import replace_text
from megatron_bupo.errors import InputError
from megatron_bupo.record.report.curves import Shown
from megatron_bupo.record.report.figures import draw_figures
from megatron_bupo.record.report.page import page

PAGE, FIGURES = "report.html", "figures"


def write_report(out: Path, shown: Sequence[Shown]) -> list[Path]:
    """Write the report on what is `shown` to the directory `out`; its files, the page first."""
    title = ", ".join(one.name for one in shown)
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / PAGE, page(title, shown))
        return [out / PAGE, *draw_figures(out / FIGURES, shown)]
    except OSError as error:
        where, reason = f"--out {out}", f"cannot be written to ({error.strerror})"
        raise InputError(where, reason, "choose another directory") from None
