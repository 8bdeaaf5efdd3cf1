"""Do failed responses fail by their plan or by its execution? A judge is asked about each.

    python tools/classify_errors.py runs/grpo runs/hicra --judge http://localhost:30000/v1 \\
        --model Qwen3-32B --out runs/errors

Each input is the directory of a run that dumped its rollouts (debug.dump_rollouts), one file of
them, or a sheet of `megatron-bupo eval` (OUT/NAME.jsonl). A response has failed if its correctness
is below --min-reward; what could not be graded is not asked about. The judge is any
OpenAI-compatible endpoint, e.g. a local SGLang; what it needs beside the usual goes into --body,
e.g. '{"max_tokens": null, "max_completion_tokens": 4096, "temperature": null}'. It chooses one of
four, in OUT/errors.jsonl,

    A  no real attempt           other
    B  low-level execution       execution
    C  high-level plan           planning
    D  acceptable after all      other

and an answer that is none of the four is counted as unclear. Shares are of all that were answered.

Answers are kept in OUT/answers.jsonl as they come: the same command goes on where it was stopped,
with more steps asks about those alone, and never asks the same model the same twice.
OUT/summary.json has the numbers by input and step, OUT/errors.png the shares over steps. The exit
code is 1 where the judge left something unanswered, 2 where the command line or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # the judge is in a module beside

from megatron_bupo.command_line import count
from megatron_bupo.commands.rollouts import PIPED_WIDTH
from megatron_bupo.durable import add_lines, drop_torn_line, replace_text, whole_lines
from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.launch import lock
from tools.error_judge import KINDS, UNCLEAR, Judge, ask_all, choice_of
from tools.error_shares import draw, rows_of, table_of
from tools.failed_responses import Response, failures_of, read_responses

CONSOLE = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Classify what the command line names."""
    args = _arguments().parse_args(argv)
    try:
        with lock.hold(args.out, key="--out ", patience_s=1):
            return classify(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="run directory, rollouts, or sheet")
    add("--judge", required=True, metavar="URL", help="e.g. http://localhost:30000/v1")
    add("--model", required=True, help="the judge's name there")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--step", default="all", metavar="N,...|last|all", help="of runs (all)")
    add("--per-step", type=count, metavar="N", help="of the failed, drawn by --seed; all")
    add("--min-reward", type=_finite, default=1.0, help="that a correct response has (1)")
    add("--seed", type=int, default=0)
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key; no key")
    add("--max-chars", type=count, default=40_000, help="of a response; its middle is left out")
    add("--max-tokens", type=count, default=1024, help="of an answer; more if the judge thinks")
    add("--body", type=_object, default={}, metavar="JSON", help="more of a request; null: less")
    add("--concurrency", type=count, default=16, metavar="N", help="requests under way (16)")
    add("--attempts", type=count, default=5, metavar="N", help="of each request (5)")
    add("--backoff-s", type=_at_least_0, default=1.0, help="before the second, then doubled (1)")
    add("--timeout-s", type=count, default=300, help="for an answer (300)")
    return parser


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number")
    return value


def _at_least_0(text: str) -> float:
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def judge_of(args: argparse.Namespace) -> Judge:
    """The judge that the command line names."""
    if not args.judge.startswith(("http://", "https://")):
        raise InputError(f"--judge {args.judge}", "is no address", "write http://HOST:PORT/v1")
    key = None if args.api_key_env is None else os.environ.get(args.api_key_env)
    if args.api_key_env is not None and not key:
        raise InputError(f"--api-key-env {args.api_key_env}", "is not set in the environment")
    if key is not None and not key.isprintable():
        raise InputError(f"--api-key-env {args.api_key_env}", "holds a key that cannot be sent")
    return Judge(
        address=args.judge,
        model=args.model,
        api_key=key,
        max_tokens=args.max_tokens,
        body=args.body,
        concurrency=args.concurrency,
        attempts=args.attempts,
        backoff_s=args.backoff_s,
        timeout_s=args.timeout_s,
    )


def classify(args: argparse.Namespace) -> int:
    """From `args.inputs` to what stands in `args.out`; the exit code."""
    judge = judge_of(args)
    failures = failures_of(
        (r for source in dict.fromkeys(args.inputs) for r in read_responses(source, args.step)),
        min_reward=args.min_reward,
        per_step=args.per_step,
        seed=args.seed,
    )
    if not failures.responses:
        raise InputError(" ".join(args.inputs), "there are no responses", "name other inputs")
    asked = {judge.key(text): text for r in failures.chosen for text in [r.asked(args.max_chars)]}
    file = args.out / "answers.jsonl"
    replies = read_answers(file)
    left = {key: text for key, text in asked.items() if key not in replies}
    CONSOLE.print(
        f"{failures.responses.total():,} responses, {failures.failed.total():,} failed, "
        f"{len(failures.chosen):,} chosen: {len(left):,} of {len(asked):,} questions to be asked"
    )
    stopped = _ask(judge, left, file, replies)
    choices = [
        choice_of(reply) or UNCLEAR if (reply := replies.get(key)) is not None else None
        for key in (judge.key(r.asked(args.max_chars)) for r in failures.chosen)
    ]
    rows = rows_of(failures, choices)
    lines = [_line(r, choice) for r, choice in zip(failures.chosen, choices, strict=True)]
    replace_text(args.out / "errors.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    summary = json.dumps({"model": judge.model, "rows": rows}, indent=1)
    replace_text(args.out / "summary.json", summary)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table_of(rows))
    draw(args.out / "errors.png", rows, {r.place: r.policy for r in failures.chosen})
    if stopped:
        print(f"error: {stopped}; the same command goes on", file=sys.stderr)
    return int(bool(stopped))


def _ask(judge: Judge, left: Mapping[str, str], file: Path, replies: dict[str, str]) -> str | None:
    """Ask what is `left`, and add to `file` and `replies`; returns what went wrong."""
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task("asking", total=len(left))

        def answered(key: str, reply: str) -> None:
            replies[key] = reply
            add_lines(file, [json.dumps({"question": key, "reply": reply})])
            progress.advance(task)

        try:
            failures = ask_all(judge, left, answered, known=bool(replies))
        except RunStopped as error:
            return str(error)
    for reason, times in Counter(failures.values()).most_common(3):
        CONSOLE.print(f"{times} without an answer: {reason}")
    return f"{len(failures)} questions have no answer" if failures else None


def read_answers(path: Path) -> dict[str, str]:
    """The replies that are kept, by question; a last line that a kill has torn goes."""
    drop_torn_line(path)
    try:
        lines = [json.loads(line) for line in whole_lines(path)]
        return {str(line["question"]): str(line["reply"]) for line in lines}
    except (KeyError, TypeError, ValueError) as error:
        reason = f"is not what was written there ({type(error).__name__}: {error})"
        raise InputError(str(path), reason, "restore it, or choose another --out") from None


def _line(response: Response, choice: str | None) -> dict[str, Any]:
    return {
        "source": response.source,
        "step": response.step,
        "prompt_index": response.prompt_index,
        "response": response.response,
        "choice": choice if choice in KINDS else None,
        "kind": KINDS.get(choice, choice) if choice else None,  # null: not answered
    }


if __name__ == "__main__":
    sys.exit(main())
