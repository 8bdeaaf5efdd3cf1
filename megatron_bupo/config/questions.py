"""The knobs of what is asked and how it is graded, as a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture; what is null is as `data` has it."""

    path: str = "???"  # as data.train
    name: str | None = None  # in metrics; None: that of the file
    weight: float = 1.0  # its share of the prompts, relative to the other sources'
    prompt_column: str | None = None
    answer_column: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Questions and answers."""

    # A JSONL, JSON, parquet or CSV file; a directory of a data set, or a hub id: both also with
    # :SPLIT or :CONFIG/SPLIT behind
    train: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)  # instead of train: a mixture
    eval: str | None = None
    # A string or a list of chat messages; `a.b` looks inside a struct. None: the first that there
    # is of prompt, question, problem
    prompt_column: str | None = None
    # None: the first that there is of answer, reward_model.ground_truth, ground_truth, final_answer
    answer_column: str | None = None
    # What the model reads around a question that is text or one user message: boxed | octothinker |
    # a text with {question} in it; None: the question as it stands. See data/questions.py
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat_template: bool | None = None  # None: yes for chat messages, no for strings
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict
    )  # e.g. enable_thinking: false
    max_prompt_tokens: int = 1024  # longer prompts are dropped, with a count
    deduplicate: bool = False  # of training questions that ask the same, keep the first
    # Training questions that evaluation asks, by the rule of data/contamination.py: warn | drop |
    # refuse
    contamination: str = "warn"
    bad_rows: str = "refuse"  # of training: refuse | skip; told by file and row
    shuffle: bool = True


@dataclass(frozen=True)
class RewardTermConfig:
    """One term of a composed reward: weight x function(response, answer, **options)."""

    function: str = "???"  # as reward.function
    weight: float = 1.0
    name: str | None = None  # in the log; None: the function's
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the function


@dataclass(frozen=True)
class RewardConfig:
    """How responses are graded."""

    # math | exact_match | format | length | overlong | repetition | package.module:function |
    # path/to/file.py:function | http://HOST:PORT/PATH
    function: str = "math"
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the function
    terms: list[RewardTermConfig] = field(default_factory=list)  # instead of the two: a sum
    timeout_s: float = 5.0  # per rollout and term; then 0 and a counted warning
    memory_mb: int | None = 2048  # that a grading process may take beyond what it starts with
    processes: int | None = None  # that grade, for each rank; None: its share of the cores, <= 8


@dataclass(frozen=True)
class BenchmarkConfig:
    """One benchmark; what is null is as `evaluation` has it."""

    name: str = "???"  # in tables, files and metrics
    data: str = "???"  # as data.eval
    responses_per_prompt: int | None = None
    pass_at: list[int] | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Avg@k and Pass@k of the full policy, by `megatron-bupo eval` and while training."""

    every: int = 0  # steps of training; 0: never
    responses_per_prompt: int = 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    max_response_tokens: int | None = None  # None: rollout.max_response_tokens
    max_prompts: int | None = None  # of each benchmark
    benchmarks: list[BenchmarkConfig] = field(default_factory=list)  # instead of data.eval
    pass_at: list[int] = field(default_factory=list)  # k of Pass@k, each <= responses_per_prompt
    responses_per_batch: int = 4096  # asked at a time: what a kill of `eval` loses at most
    confidence: float = 0.95  # of the bootstrap intervals
    bootstrap_samples: int = 1000
