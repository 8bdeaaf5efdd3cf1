"""The scores as a table in the paper's shape, beside the paper's own: `OUT/table.md`.

What a benchmark is called in the paper, and all numbers of its Table 1, stand in
`paper_results.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_bupo.errors import InputError
from megatron_bupo.evaluation.results import Score
from megatron_bupo.evaluation.scores import Estimate

FILE = Path(__file__).with_name("paper_results.yaml")


@cache
def _paper() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def paper_model(named: str | None, model: str) -> str | None:
    """The paper's model that `named` is or, where nothing is named, that the name `model` of a
    directory speaks of; None: none of them.
    """
    models = {_plain(name): name for name in _paper()["models"]}
    if named is None:
        return next((name for plain, name in models.items() if plain in _plain(model)), None)
    if _plain(named) not in models:
        reason = "the paper has no results for it"
        raise InputError(f"--beside {named}", reason, f"choose {', '.join(models.values())}")
    return models[_plain(named)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def avg_table(scores: Sequence[Score], average: Estimate, *, model: str, beside: str | None) -> str:
    """Avg@k of `model` in %, and below it the rows of the paper's model `beside`."""
    columns = _paper()["columns"]
    estimates = [*(score.avg for score in scores), average]
    rows = [
        ["", *(columns.get(score.name, score.name) for score in scores), "Avg"],
        [model, *(f"{100 * e.value:.2f} ({_ends(e)})" for e in estimates)],
    ]
    for method, values in _paper()["models"].get(beside, {}).items():
        of = dict(zip(columns, values, strict=False))
        own = [f"{of[score.name]:.2f}" if score.name in of else "" for score in scores]
        whole = {score.name for score in scores} == set(columns)
        rows.append([f"{beside} {method} (paper)", *own, f"{values[-1]:.2f}" if whole else ""])
    return _markdown(rows)


def pass_table(scores: Sequence[Score]) -> str:
    """Pass@k in %, a row per benchmark; "" where none was asked for."""
    ks = sorted({k for score in scores for k in score.pass_at})
    if not ks:
        return ""
    columns = _paper()["columns"]
    rows = [["Pass@k", *(f"k={k}" for k in ks)]]
    for score in scores:
        cells = (score.pass_at.get(k) for k in ks)
        shown = [f"{100 * e.value:.2f} ({_ends(e)})" if e else "" for e in cells]
        rows.append([columns.get(score.name, score.name), *shown])
    return _markdown(rows)


def caption(scores: Sequence[Score], *, confidence: float, beside: str | None) -> str:
    """What the numbers are."""
    counts = ", ".join(f"{score.responses_per_prompt} ({score.name})" for score in scores)
    text = (
        f"Avg@k in %, k = {counts}; in brackets where {confidence:.0%} of the means over resampled "
        "questions lie."
    )
    if beside is None:
        models = ", ".join(_paper()["models"])
        return f"{text} `--beside MODEL` adds what the paper reports for {models}."
    return f"{text} Rows of the paper: arXiv 2512.19673, Table 1."


def _ends(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f}-{100 * estimate.high:.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(_lines([rows[0], ruler, *rows[1:]], widths))


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for first, *numbers in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        yield f"| {' | '.join(cells)} |\n"
