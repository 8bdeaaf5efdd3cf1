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
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is in modules of their own

from megatron_bupo.config.schema import DataConfig, RewardConfig
from megatron_bupo.data.questions import read_question
from megatron_bupo.data.rows import read_rows
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rewards.terms import check_terms
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup

GRADERS = ("math", "exact_match", "exact_match quirks=true")
ONLY_A_STRING = "megatron_bupo.rewards.math_answers:only_a_string"
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


def answers_of(file: str, column: str | None) -> list[tuple[str, str]]:
    """The place and the answer of every row."""
    data = DataConfig(train=file, answer_column=column)
    return [(row.where, read_question(row, data).answer) for row in read_rows(file)]


def reward_of(grader: str) -> RewardConfig:
    """The function and its options, from a name and `key=value`s."""
    function, *options = grader.split()
    pairs = (option.partition("=") for option in options)
    return RewardConfig(function, {key: yaml.safe_load(value) for key, _, value in pairs})


def graded(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """The grade of every `(boxed, answer)`."""
    groups = []
    for index, (boxed, answer) in enumerate(pairs):
        prompt = Prompt(index, (), answer, "", {})
        text = rf"\boxed{{{boxed}}}"
        groups.append(RolloutGroup(prompt, (Rollout(prompt, (), text, (), None, "stop", 0),)))
    return [grade for [grade] in grader.grade(groups)]


def report(file: str, answers: Sequence[tuple[str, str]], name: str) -> Report:
    """Grade the `answers`, each with its place, by the grader of that `name`."""
    counts, reward = Counter(answer for _, answer in answers), reward_of(name)
    itself = [(answer, answer) for answer in counts]
    with closing(Grader(reward, max_response_tokens=1)) as grader:
        began = time.perf_counter()
        verdicts = dict(zip(counts, graded(grader, itself), strict=True))
        seconds = time.perf_counter() - began
        earned = {
            constant: sum(
                count * (grade.reward == 1)
                for count, grade in zip(
                    counts.values(), graded(grader, [(constant, a) for a in counts]), strict=True
                )
            )
            for constant, _ in counts.most_common(CONSTANTS)
        }
    strings = _strings(itself) if reward.function == "math" else None
    best = max(earned, key=earned.__getitem__)
    wrong = [(where, answer) for where, answer in answers if verdicts[answer].reward != 1]
    found = [(where, answer) for where, answer in answers if answer in (strings or ())]
    return Report(
        file,
        name,
        rows=len(answers),
        right=1 - len(wrong) / len(answers),
        string=None if strings is None else len(found) / len(answers),
        constant=earned[best] / len(answers),
        constant_answer=best,
        seconds=seconds,
        wrong=[
            Wrong(w, a, verdicts[a].warning or f"reward {verdicts[a].reward:g}") for w, a in wrong
        ],
        strings=[Wrong(where, a, "only the same string is right") for where, a in found],
    )


def _strings(itself: Sequence[tuple[str, str]]) -> set[str]:
    """Those of the answers that are no more than strings to `math`."""
    with closing(Grader(RewardConfig(ONLY_A_STRING))) as grader:
        grades = graded(grader, itself)
    return {answer for (answer, _), grade in zip(itself, grades, strict=True) if grade.reward}


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
