"""What is evaluated? Benchmarks with all their settings filled in, and whether they make sense."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_bupo.config.schema import BenchmarkConfig, Config, EvaluationConfig
from megatron_bupo.errors import InputError

DATA_EVAL = "eval"  # the name of the one benchmark that data.eval is
# Names are those of files, and of metrics: eval/initial_NAME... are those before training
_NAME = re.compile(r"(?!initial_)[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


def benchmarks_of(config: Config) -> list[BenchmarkConfig]:
    """Each benchmark with what it leaves open filled in from `evaluation`; k in order."""
    evaluation = config.evaluation
    named = evaluation.benchmarks
    if not named and config.data.eval is not None:
        named = [BenchmarkConfig(name=DATA_EVAL, data=config.data.eval)]
    return [_filled(benchmark, evaluation) for benchmark in named]


def max_response_tokens(config: Config) -> int:
    """The longest response that evaluation reads."""
    return config.evaluation.max_response_tokens or config.rollout.max_response_tokens


def check_evaluation(config: Config) -> None:
    """All rules of evaluation that need no files."""
    evaluation = config.evaluation
    if evaluation.benchmarks and config.data.eval is not None:
        reason = f"and evaluation.benchmarks ({_names(config)}) both say what to evaluate on"
        raise InputError(f"data.eval={config.data.eval}", reason, "set data.eval=null")
    if evaluation.every and not benchmarks_of(config):
        raise InputError(
            f"evaluation.every={evaluation.every}",
            "there is nothing to evaluate on",
            "set data.eval, or evaluation.every=0; evaluation.benchmarks names several data sets",
        )
    seen: dict[str, str] = {}
    for i, name in enumerate(benchmark.name for benchmark in evaluation.benchmarks):
        where = f"evaluation.benchmarks[{i}].name={name}"
        if not _NAME.fullmatch(name):
            reason = "cannot name files and metrics"
            way_out = "begin with a letter or digit (not initial_), go on with those and . _ -"
            raise InputError(where, reason, way_out)
        if name.lower() in seen:  # some disks fold case
            reason = f"{seen[name.lower()]} is another benchmark's name"
            raise InputError(where, reason, "choose another")
        seen[name.lower()] = name
    for i, benchmark in enumerate(benchmarks_of(config)):
        _counts_are_possible(i, benchmark, evaluation)


def _filled(benchmark: BenchmarkConfig, evaluation: EvaluationConfig) -> BenchmarkConfig:
    count, pass_at = benchmark.responses_per_prompt, benchmark.pass_at
    return replace(
        benchmark,
        responses_per_prompt=evaluation.responses_per_prompt if count is None else count,
        pass_at=sorted(set(evaluation.pass_at if pass_at is None else pass_at)),
    )


def _counts_are_possible(i: int, benchmark: BenchmarkConfig, evaluation: EvaluationConfig) -> None:
    """`i`: its place; an own setting is named there, a general one where it stands."""
    own = evaluation.benchmarks[i] if evaluation.benchmarks else BenchmarkConfig()
    section = f"evaluation.benchmarks[{i}]"
    counted = "evaluation" if own.responses_per_prompt is None else section
    listed = "evaluation" if own.pass_at is None else section
    count = benchmark.responses_per_prompt
    assert count is not None
    if count < 1:
        where = f"{counted}.responses_per_prompt={count}"
        raise InputError(where, "is out of range", "must be at least 1")
    for k in benchmark.pass_at or ():
        if not 1 <= k <= count:
            raise InputError(
                f"{listed}.pass_at={benchmark.pass_at}",
                f"Pass@{k} of {benchmark.name} cannot be told from "
                f"{counted}.responses_per_prompt={count}",
                "choose k from 1 to the number of responses, or more responses",
            )
    if benchmark.pass_at and count > 1 and evaluation.temperature == 0:
        raise InputError(
            f"{listed}.pass_at={benchmark.pass_at}",
            "evaluation.temperature=0 draws the same response again and again",
            f"set {listed}.pass_at=[], or a temperature above 0",
        )


def _names(config: Config) -> str:
    return ", ".join(benchmark.name for benchmark in config.evaluation.benchmarks)
