"""The questions of a run, from all of its files: read, cleaned and held against the evaluation.

In this order: bad rows are refused, all of them in one message, or left out (`data.bad_rows`);
questions that were asked before are dropped (`data.deduplicate`), and so are those that evaluation
asks (`data.contamination`). What is dropped is told with its number and examples, by file and row.
Nothing here needs a tokenizer or torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.contamination import Asked
from megatron_bupo.data.questions import Question, read_question
from megatron_bupo.data.rows import Row, scan_rows
from megatron_bupo.errors import InputError

BAD_ROWS_SHOWN = 10
EXAMPLES_SHOWN = 3
SKIP = "data.bad_rows=skip"


@dataclass(frozen=True)
class Source:
    """Where questions come from, as the config names it."""

    path: str
    key: str = ""  # that names the path; "": a command line does
    name: str | None = None  # in metrics; None: it is the only source
    weight: float = 1.0
    section: str = "data"  # that names its columns, where they are not the usual ones
    prompt_column: str | None = None
    answer_column: str | None = None


@dataclass(frozen=True)
class Part:
    """The questions of one source."""

    source: Source
    questions: tuple[Question, ...]
    rows: int  # of the source, good and bad

    def keeping(self, keep: Callable[[Question], bool]) -> Part:
        """The questions for which `keep` holds."""
        return replace(self, questions=tuple(filter(keep, self.questions)))


def training_sources(data: DataConfig) -> list[Source]:
    """`data.train`, or each of `data.sources` with its name; equal names get their number."""
    if data.train is not None:
        columns = data.prompt_column, data.answer_column
        return [Source(data.train, "data.train", None, 1.0, "data", *columns)]
    names = [source.name or name_of(source.path) for source in data.sources]
    return [
        Source(
            source.path,
            f"data.sources[{i}].path",
            f"{name}#{i}" if names.count(name) > 1 else name,
            source.weight,
            f"data.sources[{i}]",
            source.prompt_column or data.prompt_column,
            source.answer_column or data.answer_column,
        )
        for i, (source, name) in enumerate(zip(data.sources, names, strict=True))
    ]


def name_of(path: str) -> str:
    """What to call the source `path` in metrics: a file's or data set's own name."""
    name = Path(path).name.partition(":")[0]
    stem = Path(name).stem if Path(name).suffix in {".jsonl", ".json", ".csv", ".parquet"} else name
    return re.sub(r"[^\w.-]+", "_", stem)


def evaluation_source(path: str, data: DataConfig, *, key: str = "") -> Source:
    """The evaluation data `path`, whose columns are those that `data` names."""
    return Source(path, key, None, 1.0, "data", data.prompt_column, data.answer_column)


def read_part(
    source: Source, data: DataConfig, *, answers: bool = True
) -> tuple[Part, list[InputError]]:
    """The questions of `source`, and its bad rows, each as the error that names it."""
    return understood(scan_rows(source.path, key=source.key), source, data, answers=answers)


def understood(
    rows: Iterable[Row | InputError], source: Source, data: DataConfig, *, answers: bool
) -> tuple[Part, list[InputError]]:
    """As `read_part`, of `rows` that are at hand."""
    named = replace(data, prompt_column=source.prompt_column, answer_column=source.answer_column)
    questions: list[Question] = []
    bad: list[InputError] = []
    for row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            question = read_question(row, named, section=source.section, answers=answers)
            questions.append(question)
        except InputError as error:
            bad.append(error.with_traceback(None))
    return Part(source, tuple(questions), len(questions) + len(bad)), bad


def settle(bad: Sequence[InputError], rows: int, *, skip: bool) -> list[str]:
    """Refuse the bad among `rows` rows, or say what `data.bad_rows=skip` leaves out."""
    if not bad:
        return []
    where, reason, way_out = bad[0].args
    if len(bad) == 1 and not skip:
        raise InputError(where, reason, way_out)
    alike = len(bad) == rows and len({error.args[1] for error in bad}) == 1
    if alike and not skip:  # the fault is not the rows'
        raise InputError(where, f"{reason}, and so it is with all {rows} rows", way_out)
    listed = "; ".join(f"{error.args[0]}: {error.args[1]}" for error in bad[:BAD_ROWS_SHOWN])
    if len(bad) > BAD_ROWS_SHOWN:
        listed += f"; and {len(bad) - BAD_ROWS_SHOWN} more"
    counted = f"{len(bad)} of {rows} rows are bad"
    if not skip:
        raise InputError(counted, listed, f"{way_out}; training goes without with {SKIP}")
    if len(bad) == rows:
        raise InputError(SKIP, f"leaves no rows: {counted}: {listed}", way_out)
    return [f"{SKIP}: {counted} and left out: {listed}"]


def training_parts(data: DataConfig, evaluation: Sequence[Source]) -> tuple[list[Part], list[str]]:
    """What training asks, by source, and what there is to say about it. The rows of `evaluation`
    must be good, every one: the score of those that are is another benchmark's.
    """
    training, skip = training_sources(data), data.bad_rows == "skip"
    read = [read_part(source, data) for source in [*training, *evaluation]]
    strict = read[len(training) :] if skip else read
    settle([e for _, bad in strict for e in bad], sum(p.rows for p, _ in strict), skip=False)
    notes = [note for part, bad in read for note in settle(bad, part.rows, skip=skip)]
    parts = [part for part, _ in read]
    parts, asked = parts[: len(training)], parts[len(training) :]
    if data.deduplicate:
        parts, told = _without_repeats(parts)
        notes += told
    if asked:
        parts, told = _held_against(asked, parts, data)
        notes += told
    for part in parts:
        if not part.questions:
            where = f"{part.source.key}={part.source.path}"
            reason = "none of its questions is left, see data.deduplicate and data.contamination"
            raise InputError(where, reason, "name other data")
    return parts, notes


def _without_repeats(parts: Sequence[Part]) -> tuple[list[Part], list[str]]:
    """Each question the first time that it is asked, in the order of sources and rows."""
    first: dict[str, Question] = {}
    pairs: list[tuple[Question, Question]] = []

    def is_new(question: Question) -> bool:
        form = question.normal_form or question.asked
        before = first.setdefault(form, question)
        if before is not question:
            pairs.append((question, before))
        return before is question

    total = sum(len(part.questions) for part in parts)
    kept = [part.keeping(is_new) for part in parts]
    if not pairs:
        return kept, []
    differ = sum(question.answer != before.answer for question, before in pairs)
    told = f"data.deduplicate: dropped {len(pairs)} of {total} questions that were asked before"
    told += f", {differ} of them with another answer" if differ else ""
    return kept, [f"{told}: {_examples(pairs)}"]


def _held_against(
    asked: Sequence[Part], parts: list[Part], data: DataConfig
) -> tuple[list[Part], list[str]]:
    """`parts` by the rule `data.contamination`, where `asked` is what evaluation asks."""
    index = Asked((q.asked, q) for part in asked for q in part.questions)
    pairs = [
        (question, match)
        for part in parts
        for question in part.questions
        if (match := index.match(question.asked, question.normal_form)) is not None
    ]
    if not pairs:
        return parts, []
    total = sum(len(part.questions) for part in parts)
    told = f"{len(pairs)} of {total} training questions are asked by evaluation"
    if data.contamination == "refuse":
        way_out = "set data.contamination=drop, or take them out"
        raise InputError("data.contamination=refuse", f"{told}: {_examples(pairs)}", way_out)
    if data.contamination == "drop":
        dropped = {id(question) for question, _ in pairs}
        parts = [part.keeping(lambda question: id(question) not in dropped) for part in parts]
        told += " and dropped"
    return parts, [f"data.contamination={data.contamination}: {told}: {_examples(pairs)}"]


def _examples(pairs: Sequence[tuple[Question, Question]]) -> str:
    shown = [f"{q.row.where} repeats {other.row.where}" for q, other in pairs[:EXAMPLES_SHOWN]]
    more = [f"and {len(pairs) - len(shown)} more"] if len(pairs) > len(shown) else []
    return "; ".join([*shown, *more])
