"""Every question with all that was answered to it: `OUT/NAME.jsonl`, a line per question, in order.

::

    {"index": 0,                        its row in the data set
     "question": "...",                 what the model read, as text
     "answer": "204",                   what the grader compares with
     "responses": [{
        "text": "...",                  without special tokens
        "correctness": 1.0,             what Avg@k and Pass@k count
        "reward": 1.0,                  the grade as training would see it
        "components": {},               of a composed reward, before they are weighed
        "warning": null,                why grading failed
        "finish_reason": "stop",        stop | length: cut by evaluation.max_response_tokens
        "tokens": 17}, ...]}

Lines are added a batch at a time and are on disk before the next batch is asked. A killed run loses
the batch under way, of which a piece may stand at the end of the file: whoever goes on keeps the
whole lines of it and drops the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_bupo.durable import add_lines, drop_torn_line
from megatron_bupo.errors import InputError
from megatron_bupo.evaluation.asking import Answered, Benchmark, Marks


def sheet_file(out: Path, benchmark: str) -> Path:
    """Where the answers to the benchmark of that name are kept."""
    return out / f"{benchmark}.jsonl"


def to_line(answered: Answered) -> str:
    """A question as a line of JSON."""
    prompt = answered.prompt
    responses = [
        {
            "text": rollout.text,
            "correctness": grade.correctness,
            "reward": grade.reward,
            "components": dict(grade.components),
            "warning": grade.warning,
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.response_ids),
        }
        for rollout, grade in zip(answered.rollouts, answered.grades, strict=True)
    ]
    asked = {"index": prompt.index, "question": prompt.text, "answer": prompt.answer}
    return json.dumps(asked | {"responses": responses}, allow_nan=False)


def add(path: Path, batch: Iterable[Answered]) -> None:
    """Add the questions of `batch`, on disk when this returns."""
    add_lines(path, map(to_line, batch))


def go_on(path: Path, benchmark: Benchmark) -> list[Marks]:
    """The marks of the questions answered so far; drops what was written of another one."""
    drop_torn_line(path)
    return list(_read(path, benchmark)) if path.exists() else []


def _read(path: Path, benchmark: Benchmark) -> Iterator[Marks]:
    """The marks of the questions in `path`, checked to be those of `benchmark`, in order."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _marks(json.loads(line), number - 1, benchmark)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                where = f"{path}: line {number}"
                reason = f"is not what an evaluation wrote ({type(error).__name__}: {error})"
                raise InputError(where, reason, "restore it, or choose another --out") from None


def _marks(line: Any, place: int, benchmark: Benchmark) -> Marks:
    asked, responses = benchmark.prompts[place], line["responses"]
    if line["index"] != asked.index or line["answer"] != asked.answer:
        raise ValueError(f"not data row {asked.index}")
    if len(responses) != benchmark.sampling.responses_per_prompt:
        raise ValueError(f"{len(responses)} responses")
    return Marks(
        tuple(_number(response["correctness"]) for response in responses),
        tuple(int(response["tokens"]) for response in responses),
        tuple(response["finish_reason"] != "stop" for response in responses),
        tuple(response["warning"] for response in responses),
    )


def _number(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a grade")
    return float(value)
