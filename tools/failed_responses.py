"""Which responses of runs and evaluations have failed, and what is a judge asked about them?"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bupo.commands.rollouts import chosen_steps
from megatron_bupo.errors import InputError
from megatron_bupo.record.rollout_files import find_steps, read_rollouts
from tools.error_judge import QUESTION

Place = tuple[str, int | None]  # source and step


@dataclass(frozen=True)
class Response:
    """A response and where it is from; `correct` NaN: it could not be graded."""

    source: str  # the input, as it was named
    step: int | None  # None: of an evaluation
    policy: str  # that the step trained
    prompt_index: int
    response: int  # its number among those to the prompt
    question: str
    answer: str
    text: str
    cut: bool
    correct: float

    @property
    def place(self) -> Place:
        """Where it is counted."""
        return self.source, self.step

    def asked(self, max_chars: int) -> str:
        """What the judge is asked about it."""
        text = self.text
        if (more := len(text) - max_chars) > 0:
            begin, end = max_chars - max_chars // 2, len(text) - max_chars // 2
            text = f"{text[:begin]}\n[{more} characters are left out here]\n{text[end:]}"
        cut = " (cut off at the limit of its length)" if self.cut else ""
        return QUESTION.format(question=self.question, answer=self.answer, text=text, cut=cut)


def read_responses(source: str, steps: str) -> Iterator[Response]:
    """All responses of an input; of a run those of `steps`."""
    path = Path(source)
    if path.is_dir():
        for file in chosen_steps(find_steps(path), steps).values():
            yield from _of_rollouts(source, file)
    elif "responses" in _first_line(path):
        yield from _of_sheet(source, path)
    else:
        yield from _of_rollouts(source, path)


def _first_line(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            line = json.loads(file.readline() or "null")
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "name a run_dir, its rollouts or a sheet") from None
    return line if isinstance(line, dict) else {}


def _of_rollouts(source: str, path: Path) -> Iterator[Response]:
    for rollout in read_rollouts(path):
        prompt, grade = rollout.prompt, rollout.grade
        yield Response(
            source=source,
            step=rollout.step,
            policy=rollout.policy or "full",
            prompt_index=prompt.index,
            response=rollout.response,
            question=prompt.text,
            answer=prompt.answer,
            text=str(rollout.text),
            cut=rollout.finish_reason != "stop",
            correct=math.nan if grade.warning else grade.correctness,
        )


def _of_sheet(source: str, path: Path) -> Iterator[Response]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                asked = json.loads(line)
                for place, response in enumerate(asked["responses"]):
                    yield Response(
                        source=source,
                        step=None,
                        policy="full",
                        prompt_index=int(asked["index"]),
                        response=place,
                        question=str(asked["question"]),
                        answer=str(asked["answer"]),
                        text=str(response["text"]),
                        cut=response["finish_reason"] != "stop",
                        correct=math.nan if response["warning"] else float(response["correctness"]),
                    )
            except (KeyError, TypeError, ValueError) as error:
                where = f"{path}: line {number}"
                reason = f"is not what an evaluation wrote ({type(error).__name__}: {error})"
                raise InputError(where, reason, "restore it") from None


@dataclass(frozen=True)
class Failures:
    """What there is to ask about, and how many responses there were at each place."""

    responses: Counter[Place]
    failed: Counter[Place]
    not_graded: Counter[Place]
    chosen: list[Response]  # of the failed, those that are asked about


def failures_of(
    responses: Iterable[Response], *, min_reward: float, per_step: int | None, seed: int
) -> Failures:
    """The failed of `responses`; at most `per_step` of each step, drawn by `seed`."""
    counts: Counter[Place] = Counter()
    not_graded: Counter[Place] = Counter()
    failed: dict[Place, list[Response]] = defaultdict(list)
    for response in responses:
        place = response.place
        counts[place] += 1
        not_graded[place] += math.isnan(response.correct)
        if response.correct < min_reward:
            failed[place].append(response)
    chosen: list[Response] = []
    for place, some in failed.items():
        if per_step is not None and len(some) > per_step:
            picked = random.Random(f"{seed} {place}").sample(range(len(some)), per_step)
            chosen += [some[i] for i in sorted(picked)]
        else:
            chosen += some
    sizes = Counter({place: len(some) for place, some in failed.items()})
    return Failures(counts, sizes, not_graded, chosen)
