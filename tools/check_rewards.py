r"""Would the right answer be graded as right? Every reference answer of a data set, put in a box,
is graded against itself.

    python tools/check_rewards.py train.parquet test.jsonl
    python tools/check_rewards.py train.jsonl --function math --function "exact_match quirks=true"
    python tools/check_rewards.py train.jsonl --answer-column solution --json report.json

A table with a line per file and grader:

    right     share of the answers for which `\boxed{answer}` gets reward 1
    string    `math` only: neither a number, nor a word, nor a formula that it can parse, so that
              nothing but the same string is right
    constant  the share of rows that one and the same answer gets right, and that answer: what a
              policy earns that has learned nothing else
    seconds   for grading the distinct answers once

Below it the answers that are not right and those that are strings only, with file and row. It is a
weak test, one parser on both sides: what fails here is lost to training for certain. The exit code
is 1 where an answer is not right, 2 where the data cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is in modules of their own

from megatron_bupo.config.schema import DataConfig, RewardConfig
from megatron_bupo.data.questions import read_question
from megatron_bupo.data.rows import read_rows
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rewards.math_answers import is_formula
from megatron_bupo.rewards.terms import check_terms
from megatron_bupo.types import Prompt, Rollout, RolloutGroup

GRADERS = ("math", "exact_match", "exact_match quirks=true")
CONSTANTS = 3  # of the commonest answers, those that are tried on all rows
SHOWN = 20  # lines of each kind; the JSON file has all


@dataclass(frozen=True)
class Wrong:
    """An answer that is not what it should be."""

    where: str  # file and row
    answer: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What one grader makes of the answers of one file; shares are of its rows."""

    file: str
    grader: str
    rows: int
    right: float
    string: float | None  # None: not asked
    constant: float
    constant_answer: str
    seconds: float
    wrong: list[Wrong]
    strings: list[Wrong]


def only_a_string(response: str, answer: str) -> bool:  # noqa: ARG001 - as all reward functions
    """A reward function for our own use: is `answer` beyond what `math` can read?"""
    return not is_formula(answer)


def answers_of(file: str, column: str | None) -> list[tuple[str, str]]:
    """The place and the answer of every row."""
    data = DataConfig(train=file, answer_column=column)
    return [(row.where, read_question(row, data).answer) for row in read_rows(file)]


def reward_of(grader: str) -> RewardConfig:
    """The function and its options, from a name and `key=value`s."""
    function, *options = grader.split()
    pairs = (option.partition("=") for option in options)
    return RewardConfig(function, {key: yaml.safe_load(value) for key, _, value in pairs})


def graded(
    reward: RewardConfig, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, str | None]]:
    """The reward and warning of every `(boxed, answer)`."""
    groups = []
    for index, (boxed, answer) in enumerate(pairs):
        prompt = Prompt(index, (), answer, "", {})
        text = rf"\boxed{{{boxed}}}"
        groups.append(RolloutGroup(prompt, (Rollout(prompt, (), text, (), None, "stop", 0),)))
    grader = Grader(reward, max_response_tokens=1)
    try:
        return [(grade.reward, grade.warning) for [grade] in grader.grade(groups)]
    finally:
        grader.close()


def report(file: str, answers: Sequence[tuple[str, str]], grader: str) -> Report:
    """Grade the `answers`, each with its place, by `grader`."""
    counts = Counter(answer for _, answer in answers)
    distinct, reward = list(counts), reward_of(grader)
    began = time.perf_counter()
    against_themselves = graded(reward, [(answer, answer) for answer in distinct])
    seconds = time.perf_counter() - began
    verdicts = dict(zip(distinct, against_themselves, strict=True))
    is_math = reward.function == "math"
    asked = RewardConfig(f"{Path(__file__).resolve()}:only_a_string")
    kinds = graded(asked, [(a, a) for a in distinct]) if is_math else [(0.0, None)] * len(distinct)
    strings = {answer for answer, (kind, _) in zip(distinct, kinds, strict=True) if kind}
    earned = {
        constant: sum(
            counts[answer]
            for answer, (value, _) in zip(
                distinct, graded(reward, [(constant, answer) for answer in distinct]), strict=True
            )
            if value == 1
        )
        for constant, _ in counts.most_common(CONSTANTS)
    }
    best = max(earned, key=earned.__getitem__)
    return Report(
        file,
        grader,
        rows=len(answers),
        right=sum(verdicts[answer][0] == 1 for _, answer in answers) / len(answers),
        string=sum(answer in strings for _, answer in answers) / len(answers) if is_math else None,
        constant=earned[best] / len(answers),
        constant_answer=best,
        seconds=seconds,
        wrong=[
            Wrong(where, answer, verdicts[answer][1] or f"reward {verdicts[answer][0]:g}")
            for where, answer in answers
            if verdicts[answer][0] != 1
        ],
        strings=[Wrong(w, a, "only the same string is right") for w, a in answers if a in strings],
    )


def lines(reports: Sequence[Report]) -> Iterator[str]:
    """The table and the answers to look at."""
    cells = [["file", "grader", "rows", "right", "string", "constant", "seconds"]]
    for r in reports:
        string = "" if r.string is None else f"{r.string:.2%}"
        constant = f"{r.constant:.1%} {r.constant_answer}"
        name = Path(r.file).name
        right, seconds = f"{r.right:.2%}", f"{r.seconds:.1f}"
        cells.append([name, r.grader, str(r.rows), right, string, constant, seconds])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield line.rstrip()
    for r in reports:
        for found in (r.wrong, r.strings):
            yield from (f"{w.where}: {r.grader}: {w.answer!r}: {w.reason}" for w in found[:SHOWN])
            if len(found) > SHOWN:
                yield f"... and {len(found) - SHOWN} more"


def main(argv: Sequence[str] | None = None) -> int:
    """Report on the files named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="files or hub ids, as data.train")
    parser.add_argument("--function", action="append", help='as reward.function, with "key=value"s')
    parser.add_argument("--answer-column", help="as data.answer_column")
    parser.add_argument("--json", type=Path, help="write all of it there")
    args = parser.parse_args(argv)
    try:
        graders = args.function or GRADERS
        for grader in graders:
            check_terms(reward_of(grader), 1)
        files = {file: answers_of(file, args.answer_column) for file in args.data}
        if args.json is not None and not args.json.parent.is_dir():
            raise InputError(f"--json {args.json}", "its directory does not exist", "make it first")
        reports = [report(f, answers, g) for f, answers in files.items() for g in graders]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(reports)))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    return int(any(r.wrong for r in reports))


if __name__ == "__main__":
    sys.exit(main())
