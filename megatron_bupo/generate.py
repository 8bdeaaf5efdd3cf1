"""Responses from any policy, to read, to write down, and to compare policies by their rewards.

All policies draw with the same noise. The standard error of a mean reward is that of the mean over
prompts: responses to one prompt resemble each other, and do not count as so many.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from megatron_bupo import collective
from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.commands.generate import Generation
from megatron_bupo.config import Config, expand
from megatron_bupo.durable import replacing
from megatron_bupo.engines import rollout_engine, sharing_ranks
from megatron_bupo.record.measures import warnings_of
from megatron_bupo.record.rollout_files import fields_of, to_line
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Grade, Rollout, RolloutGroup, Sampling

PROMPTS_SHOWN = 10  # of each policy
NOT_GRADED = Grade(math.nan)


@dataclass(frozen=True)
class Answers:
    """What a policy answered: a group per prompt, and a grade per response."""

    policy: Policy
    groups: Sequence[RolloutGroup]
    grades: Sequence[Sequence[Grade]]

    def __iter__(self) -> Iterator[tuple[int, Rollout, Grade]]:
        """Every response, with its number among those to its prompt."""
        for group, grades in zip(self.groups, self.grades, strict=True):
            for response, (rollout, grade) in enumerate(zip(group.rollouts, grades, strict=True)):
                yield response, rollout, grade


def generate(generation: Generation) -> None:
    """Show what each policy answers, and write and grade it if asked to. Every rank runs this."""
    ready, config = generation.ready, generation.ready.config
    with ExitStack() as stack:
        stack.enter_context(sharing_ranks())
        most = config.rollout.max_response_tokens
        grader = Grader(config.reward, max_response_tokens=most) if generation.grades else None
        if grader is not None:
            stack.callback(grader.close)
        run_dir = Path(expand(config.run_dir)) / "generate"  # servers keep their logs there
        engine = rollout_engine(config, ready.architecture, generation.tokenizer, run_dir=run_dir)
        stack.callback(engine.close)
        engine.wait_until_up(_say)
        file = None
        if generation.out is not None and collective.is_first():
            file = stack.enter_context(replacing(generation.out))
        rows = []
        for policy in generation.policies:
            engine.sample_from(policy)
            groups = engine.generate(generation.prompts, _sampling(config))
            grades = grader.grade(groups) if grader is not None else not_graded(groups)
            answers = Answers(policy, groups, grades)
            rows.append(summary(answers))
            _say("\n".join(shown(answers)))
            for warning in warnings_of(grades):
                _say(f"warning: {warning}")
            if file is not None:
                file.writelines(f"{line}\n".encode() for line in lines_of(answers))
        engine.sample_from(FULL)  # servers that run on are left as they were found
        if len(rows) > 1 or grader is not None:
            _say("\n".join(table(rows)))


def _sampling(config: Config) -> Sampling:
    return Sampling(
        responses_per_prompt=config.rollout.responses_per_prompt,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=config.seed,
    )


def not_graded(groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
    """What stands for the grades of `groups` where nobody grades."""
    return [[NOT_GRADED] * len(group.rollouts) for group in groups]


def _say(text: str) -> None:
    if collective.is_first():
        print(text, flush=True)


def name_of(policy: Policy) -> str:
    """As `--policy` has it, and whether through the norm."""
    if not isinstance(policy, InternalLayerPolicy):
        return "full"
    return f"layer={policy.layer}" + (" normed" if policy.read_out_norm else "")


def lines_of(answers: Answers) -> Iterator[str]:
    """A line of JSON per response, in the words of `record/rollout_files.py`."""
    policy = {"policy": name_of(answers.policy)}
    for response, rollout, grade in answers:
        row = policy | {"response": response} | fields_of(rollout, grade)
        if grade is NOT_GRADED:
            row["reward"] = None
        yield to_line(row)


def shown(answers: Answers) -> Iterator[str]:
    """The first prompts with their responses, for a terminal."""
    yield f"policy {name_of(answers.policy)}"
    for group, grades in list(zip(answers.groups, answers.grades, strict=True))[:PROMPTS_SHOWN]:
        yield _indented(group.prompt.text, "  prompt  ")
        for rollout, grade in zip(group.rollouts, grades, strict=True):
            yield _indented(rollout.text, "          ")
            yield f"            {_facts(rollout, grade)}"
    if len(answers.groups) > PROMPTS_SHOWN:
        yield f"  ... and {len(answers.groups) - PROMPTS_SHOWN} prompts more"


def _indented(text: str, lead: str) -> str:
    rest = textwrap.indent(text, " " * len(lead), lambda _: True)
    return lead + rest[len(lead) :]


def _facts(rollout: Rollout, grade: Grade) -> str:
    count = len(rollout.response_ids)
    facts = [rollout.finish_reason, f"{count} token{'s' * (count != 1)}"]
    if count:
        facts.append(f"mean log-prob {fmean(rollout.rollout_logprobs):.3f} nats")
    if grade is not NOT_GRADED:
        facts.append(f"reward {grade.reward:g}")
    return ", ".join(facts)


@dataclass(frozen=True)
class Summary:
    """A policy's answers in numbers; means over tokens are in nats."""

    policy: str
    responses: int
    tokens_mean: float  # per response
    stopped_fraction: float
    logprob_mean: float
    entropy_mean: float | None  # None: the engine does not say
    reward_mean: float | None  # None: not graded
    reward_error: float | None  # standard error; None: fewer than two prompts


def summary(answers: Answers) -> Summary:
    """The numbers to compare policies by."""
    rollouts = [rollout for _, rollout, _ in answers]
    entropies = [h for r in rollouts for h in r.entropies or ()]
    graded = any(grade is not NOT_GRADED for _, _, grade in answers)
    by_prompt = [fmean(grade.reward for grade in grades) for grades in answers.grades]
    several = graded and len(by_prompt) > 1
    return Summary(
        policy=name_of(answers.policy),
        responses=len(rollouts),
        tokens_mean=fmean(len(r.response_ids) for r in rollouts),
        stopped_fraction=fmean(r.finish_reason == "stop" for r in rollouts),
        logprob_mean=fmean([x for r in rollouts for x in r.rollout_logprobs] or [math.nan]),
        entropy_mean=fmean(entropies) if entropies else None,
        reward_mean=fmean(by_prompt) if graded else None,
        reward_error=stdev(by_prompt) / math.sqrt(len(by_prompt)) if several else None,
    )


def table(rows: Sequence[Summary]) -> Iterator[str]:
    """A line per policy under a heading."""
    cells = [
        ["policy", "reward", "responses", "tokens", "stopped", "log-prob", "entropy (nats)"],
        *(
            [
                row.policy,
                "" if row.reward_mean is None else f"{row.reward_mean:.3f}{_plus_minus(row)}",
                f"{row.responses}",
                f"{row.tokens_mean:.1f}",
                f"{row.stopped_fraction:.0%}",
                f"{row.logprob_mean:.3f}",
                "" if row.entropy_mean is None else f"{row.entropy_mean:.3f}",
            ]
            for row in rows
        ),
    ]
    columns = [column for column in zip(*cells, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        first, *rest = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "   ".join([first, *rest]).rstrip()


def _plus_minus(row: Summary) -> str:
    return "" if row.reward_error is None else f" ± {row.reward_error:.3f}"
