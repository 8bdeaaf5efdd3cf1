"""A page to read rollouts in: one HTML file with all it needs, tokens coloured by what is known of
them. `rollout_page.html` is the page, this fills it with the data.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.record.rollout_files import RecordedRollout

_TEMPLATE = Path(__file__).with_suffix(".html")
_DIGITS = 5  # significant, of the numbers on the page


@dataclass(frozen=True)
class ReadableRollout:
    """A rollout with the text of each response token; of tokens that make up one character, the
    first has its text. `planning`: which tokens are part of a strategic gram, if that was asked.
    """

    rollout: RecordedRollout
    pieces: tuple[str, ...]
    planning: tuple[bool, ...] | None = None


def rollout_page(title: str, steps: Mapping[int, Sequence[ReadableRollout]]) -> str:
    """The page that shows `steps`."""
    data = "\n".join(
        f'<script type="application/json" data-step="{step}">{_json(rollouts)}</script>'
        for step, rollouts in steps.items()
    )
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("<!--TITLE-->", html.escape(title)).replace("<!--STEPS-->", data)


def _json(rollouts: Sequence[ReadableRollout]) -> str:
    first = rollouts[0].rollout
    groups = []
    for readable in rollouts:
        rollout = readable.rollout
        if rollout.response == 0 or not groups:
            prompt = rollout.prompt
            group = {"index": prompt.index, "prompt": prompt.text, "answer": prompt.answer}
            groups.append({**group, "rollouts": []})
        groups[-1]["rollouts"].append(_rollout(readable))
    step = {"step": first.step, "policy": first.policy, "groups": groups}
    text = json.dumps(step, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # or "</script>" in a response would end the data


def _rollout(readable: ReadableRollout) -> dict[str, Any]:
    """What the page's script reads; see `COLOURS` and `tell` there."""
    rollout = readable.rollout
    return {
        "response": rollout.response,
        "reward": _number(rollout.grade.reward),
        "warning": rollout.grade.warning,
        "finish": rollout.finish_reason,
        "version": rollout.policy_version,
        "versions": rollout.versions,
        "server": rollout.server,
        "attempts": rollout.attempts,
        "cached": rollout.cached_tokens,
        "ids": rollout.response_ids,
        "pieces": readable.pieces,
        "advantages": _column(rollout.advantages),
        "sampled": _column(rollout.rollout_logprobs),
        "old": _column(rollout.old_logprobs),
        "ref": _column(rollout.ref_logprobs),
        "entropies": _column(rollout.entropies),
        "policy_entropies": _column(rollout.policy_entropies),
        "planning": None if readable.planning is None else list(map(int, readable.planning)),
    }


def _column(values: Sequence[float] | None) -> list[float | None] | float | None:
    """The values of all tokens; one for all of them where they are the same."""
    if values is None:
        return None
    if len(set(values)) == 1:
        return _number(values[0])
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
