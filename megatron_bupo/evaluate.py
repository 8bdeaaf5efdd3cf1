"""A suite, benchmark by benchmark and batch by batch; each is on disk before the next is asked.

::

    OUT/NAME.jsonl      every question of a benchmark with all responses (evaluation/sheets.py)
    OUT/state.json      what they were drawn with (evaluation/identity.py)
    OUT/results.json    the scores (evaluation/results.py), OUT/table.md, OUT/pass_at_k.png
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_bupo import collective
from megatron_bupo.commands.evaluate import Evaluation
from megatron_bupo.config.evaluation_rules import max_response_tokens
from megatron_bupo.config.schema import EvaluationConfig
from megatron_bupo.durable import replace_text
from megatron_bupo.engines import rollout_engine, sharing_ranks
from megatron_bupo.evaluation.asking import Benchmark, Marks, ask, avg_at_k
from megatron_bupo.evaluation.curves import draw_pass_at_k
from megatron_bupo.evaluation.identity import State, write_state
from megatron_bupo.evaluation.results import Resampling, Score, average, score
from megatron_bupo.evaluation.sheets import add, go_on, sheet_file
from megatron_bupo.evaluation.tables import avg_table, caption, pass_table
from megatron_bupo.record.heartbeat import heartbeat
from megatron_bupo.record.suite import SuiteDisplay
from megatron_bupo.rewards.grader import Grader, Grading
from megatron_bupo.rollout.engine import RolloutEngine

RESULTS, TABLE, CURVES = "results.json", "table.md", "pass_at_k.png"


def evaluate(evaluation: Evaluation, state: State | None) -> None:
    """Ask what is left of the suite, then score all of it. Every rank runs this; the first one has
    the `state` of the directory, and writes.
    """
    ready, out = evaluation.ready, evaluation.out
    config = ready.config
    with ExitStack() as stack:
        stack.enter_context(heartbeat(out, ready.layout.world, config.logging.stall_s))
        stack.enter_context(sharing_ranks())
        writes = collective.is_first()
        display = SuiteDisplay(on=writes, live=config.logging.progress)
        stack.enter_context(display)
        marks = [go_on(sheet_file(out, b.name), b) if writes else [] for b in evaluation.benchmarks]
        done = collective.gather([[len(questions) for questions in marks]])[0]
        left = [len(b.prompts) - n for b, n in zip(evaluation.benchmarks, done, strict=True)]
        if any(left):
            most = max_response_tokens(config)
            # early: its process starts while the rest loads
            grader = Grader(config.reward, max_response_tokens=most)
            stack.callback(grader.close)
            engine = rollout_engine(config, ready.architecture, evaluation.tokenizer, run_dir=out)
            stack.callback(engine.close)
            engine.wait_until_up(display.say)
            suite = _Suite(evaluation, engine, grader, display)
            for benchmark, its_marks, first in zip(evaluation.benchmarks, marks, done, strict=True):
                state = suite.ask(benchmark, its_marks, first, state)
    if state is not None:
        display.say("\n".join(write_results(evaluation, marks, state)))


class _Suite:
    """What asking needs, whichever benchmark it is."""

    def __init__(
        self,
        evaluation: Evaluation,
        engine: RolloutEngine,
        grader: Grading,
        display: SuiteDisplay,
    ) -> None:
        self.out, self.config = evaluation.out, evaluation.ready.config.evaluation
        self.engine, self.grader, self.display = engine, grader, display

    def ask(
        self, benchmark: Benchmark, marks: list[Marks], first: int, state: State | None
    ) -> State | None:
        """Ask the questions from `first` on, and add to `marks` and `state` what comes of them."""
        self.display.begin(benchmark.name, len(benchmark.prompts), done=first)
        began = time.monotonic()
        size = self.config.responses_per_batch
        for batch in ask(
            benchmark, self.engine, self.grader, responses_per_batch=size, first=first
        ):
            new = [Marks.of(answered) for answered in batch]
            marks += new
            if state is not None:
                add(sheet_file(self.out, benchmark.name), batch)
                now = time.monotonic()
                state, began = state.after(benchmark, now - began), now
                write_state(self.out, state)
            self._tell(len(marks), marks, new)
        return state

    def _tell(self, done: int, marks: Sequence[Marks], new: Sequence[Marks]) -> None:
        tokens = sum(sum(question.tokens) for question in new)
        self.display.answered(done, avg=avg_at_k(marks), tokens=tokens)
        for warning in sorted({w for question in new for w in question.warnings if w}):
            self.display.say(f"warning: {warning}")


def write_results(
    evaluation: Evaluation, marks: Sequence[Sequence[Marks]], state: State
) -> list[str]:
    """Write the scores, the tables and the curves; what to tell of them, in lines."""
    config, out, model = evaluation.ready.config, evaluation.out, evaluation.model
    scores = [
        score(
            benchmark,
            questions,
            resampling=_resampling(config.evaluation, config.seed),
            seconds=state.seconds.get(benchmark.name, 0.0),
        )
        for benchmark, questions in zip(evaluation.benchmarks, marks, strict=True)
    ]
    confidence = config.evaluation.confidence
    mean = average(scores, confidence=confidence)
    content = {
        "model": model,
        "benchmarks": {s.name: s.as_json() for s in scores},
        "average": mean._asdict(),
        "confidence": confidence,
        "settings": {
            **state.settings,
            "benchmarks": {s.name: state.benchmarks[s.name] for s in scores},
        },
    }
    replace_text(out / RESULTS, json.dumps(content, indent=1) + "\n")
    beside = evaluation.beside
    parts = [
        avg_table(scores, mean, model=model, beside=beside),
        caption(scores, confidence=confidence, beside=beside),
        pass_table(scores),
    ]
    text = "\n\n".join(part.rstrip() for part in parts if part)
    (out / TABLE).write_text(f"{text}\n", encoding="utf-8")
    curves = draw_pass_at_k(out / CURVES, scores, model=model, confidence=confidence)
    return ["", text, "", *_costs(scores), _where(evaluation, curves is not None)]


def _resampling(evaluation: EvaluationConfig, seed: int) -> Resampling:
    return Resampling(evaluation.confidence, evaluation.bootstrap_samples, seed)


def _costs(scores: Sequence[Score]) -> list[str]:
    """What each benchmark took, and what there is to know of its responses."""
    lines = []
    for each in scores:
        count = each.questions * each.responses_per_prompt
        facts = [
            f"{each.questions} questions x {each.responses_per_prompt} responses",
            f"{each.tokens / count:.0f} tokens each",
            f"{each.truncated_fraction:.1%} truncated",
            f"{each.seconds:.0f} s",
        ]
        if each.seconds:
            facts.append(f"{each.tokens / each.seconds:.0f} tokens per second")
        if each.grader_warnings:
            facts.append(f"{each.grader_warnings} could not be graded and count as wrong")
        lines.append(f"{each.name}: {', '.join(facts)}")
    return lines


def _where(evaluation: Evaluation, has_curves: bool) -> str:
    files = [RESULTS, TABLE, *([CURVES] if has_curves else [])]
    answers = [f"{benchmark.name}.jsonl" for benchmark in evaluation.benchmarks]
    return f"in {evaluation.out}: {', '.join([*files, *answers])}"
