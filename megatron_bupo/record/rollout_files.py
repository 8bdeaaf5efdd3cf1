"""Every rollout of a step, with what became of it: the files that `debug.dump_rollouts` writes,
`debug.replay` trains from and `megatron-bupo rollouts show` shows.

::

    run_dir/rollouts/step-000012.jsonl       a JSON object per rollout, a prompt's rollouts together

    step              counted from 0
    policy            that the step trained, e.g. "internal layer 6"; null: nothing was trained
    prompt_index      the prompt's row in the data
    source            of a mixture, that the prompt is from; else null
    response          its number among the responses to the prompt, from 0
    prompt, answer    the prompt as text; what the grader compares with
    row               the whole data row; null where it is not JSON
    input_ids         token ids of the prompt
    response_ids      token ids of the response; the lists marked * have an entry for each of them
    text              the response, without special tokens
    rollout_logprobs  * nats, of the policy that sampled, at the sampling temperature
    entropies         * nats, of the distributions drawn from; null: the engine does not say
    old_logprobs      * nats, of the policy that trains, before the step's first update
    policy_entropies  * nats, of the same
    ref_logprobs      * nats, of the same policy with the initial weights; null: no KL is asked for
    reward, warning   the grade; why it is 0 where grading failed, else null
    components        the terms of a composed reward by name, before they are weighed
    advantages        * what the loss weighs each token with
    values, returns   * what PPO's critic foresaw, and what it then learned; null: no critic
    policy_version    steps that the weights had learned from when the first token was drawn
    versions          [version, start, end]: response tokens [start, end) are of these weights
    finish_reason     stop | length | abort
    server, attempts  which one finished it (null: none), after how many requests
    cached_tokens     of the prompt, found in the server's prefix cache

Floats are written so that they are read back to the bit; null stands for one that is not finite.
A file gets its name by one rename, when it is whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.durable import replacing
from megatron_bupo.errors import InputError
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup, TokenBatch, VersionSpan

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.algorithm.bupo import Policy

FOLDER = "rollouts"
_NAME = re.compile(r"step-(\d{6,})\.jsonl")
_WAY_OUT = "dump the step again"


@dataclass(frozen=True, kw_only=True)
class RecordedRollout(Rollout):
    """A rollout with what became of it: the line of a file, see above."""

    step: int
    policy: str | None
    response: int
    grade: Grade
    advantages: tuple[float, ...] | None = None
    old_logprobs: tuple[float, ...] | None = None
    policy_entropies: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None
    returns: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Learned:
    """What a step trained with its rollouts: the policy, the batch with its advantages, and the
    policy's log-probs and entropies before the first update, `[responses, tokens]` nats.
    """

    policy: Policy
    batch: TokenBatch
    scores: tuple[Tensor, Tensor] | None

    def tokens(self) -> Iterator[dict[str, Any]]:
        """What is known of the response tokens, response by response."""
        old_logprobs, entropies = self.scores or (self.batch.old_logprobs, None)
        tensors = {
            "old_logprobs": old_logprobs,
            "policy_entropies": entropies,
            "ref_logprobs": self.batch.ref_logprobs,
            "advantages": self.batch.advantages,
            "values": self.batch.values,
            "returns": self.batch.returns,
        }
        for i, mask in enumerate(self.batch.response_mask):
            yield {k: None if v is None else v[i][mask].tolist() for k, v in tensors.items()}


def step_file(run_dir: Path, step: int) -> Path:
    """Where the rollouts of `step` are kept."""
    return run_dir / FOLDER / f"step-{step:06d}.jsonl"


def find_steps(directory: Path) -> dict[int, Path]:
    """The files by step; `directory` is a run's, or the folder itself."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    if not folder.is_dir():
        raise InputError(str(directory), "there is no such directory", "name a run_dir")
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    steps = {int(match[1]): path for match, path in named if match}
    if not steps:
        way_out = "train with debug.dump_rollouts=true, or with debug.rollout_only=true"
        raise InputError(str(directory), "holds no rollouts", way_out)
    return dict(sorted(steps.items()))


def write_rollouts(
    run_dir: Path,
    step: int,
    groups: Sequence[RolloutGroup],
    grades: Sequence[Sequence[Grade]],
    learned: Learned | None = None,
) -> None:
    """Write the file of `step`."""
    path = step_file(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    policy = None if learned is None else str(learned.policy)
    tokens = repeat({}) if learned is None else learned.tokens()
    with replacing(path) as file:
        for group, its_grades in zip(groups, grades, strict=True):
            rollouts = zip(group.rollouts, its_grades, strict=True)
            for response, (rollout, grade) in enumerate(rollouts):
                place = {"step": step, "policy": policy, "response": response}
                line = to_line(place | fields_of(rollout, grade) | next(tokens))
                file.write(f"{line}\n".encode())


def fields_of(rollout: Rollout, grade: Grade) -> dict[str, Any]:
    """What is known of a rollout that nothing was learned from."""
    prompt = rollout.prompt
    return {
        "reward": grade.reward,
        "warning": grade.warning,
        "components": dict(grade.components),
        "prompt_index": prompt.index,
        "source": prompt.source,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "versions": rollout.versions,
        "server": rollout.server,
        "attempts": rollout.attempts,
        "cached_tokens": rollout.cached_tokens,
        "row": _row(prompt.row),
        "input_ids": prompt.input_ids,
        "response_ids": rollout.response_ids,
        "rollout_logprobs": rollout.rollout_logprobs,
        "entropies": rollout.entropies,
    }


def _row(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    try:
        return None if row is None else json.loads(json.dumps(dict(row), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def to_line(line: Mapping[str, Any]) -> str:
    """`line` as JSON."""
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:  # something is not finite: rare, so looked for only now
        return json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list | tuple) else value


def read_rollouts(path: Path) -> list[RecordedRollout]:
    """The rollouts of a step, in order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, _WAY_OUT) from None
    if not lines:
        raise InputError(str(path), "is empty", _WAY_OUT)
    return [_rollout(f"{path}: line {n}", line) for n, line in enumerate(lines, start=1)]


def grouped(rollouts: Sequence[RecordedRollout]) -> list[RolloutGroup]:
    """A step's rollouts by prompt; not by its index, for a small data set asks twice in a step."""
    begins = [i for i, rollout in enumerate(rollouts) if rollout.response == 0 or i == 0]
    ends = [*begins[1:], len(rollouts)]
    return [
        RolloutGroup(rollouts[begin].prompt, tuple(rollouts[begin:end]))
        for begin, end in zip(begins, ends, strict=True)
    ]


def _rollout(where: str, text: str) -> RecordedRollout:
    """The rollout of a line; `where` names file and line."""
    try:
        return _parsed(json.loads(text))
    except KeyError as error:
        raise InputError(where, f"has no {error.args[0]!r}", _WAY_OUT) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(where, f"is no rollout ({error})", _WAY_OUT) from None


def _parsed(line: Any) -> RecordedRollout:
    if not isinstance(line, dict):
        raise TypeError("not an object")
    same = ("step", "policy", "response", "text", "finish_reason", "policy_version")
    same += ("server", "attempts", "cached_tokens")
    maybe = ("entropies", "old_logprobs", "policy_entropies", "ref_logprobs", "advantages")
    maybe += ("values", "returns")
    fields: dict[str, Any] = {name: line[name] for name in same}
    for name in maybe:
        fields[name] = None if line.get(name) is None else _per_token(line, name)
    return RecordedRollout(
        prompt=Prompt(
            index=line["prompt_index"],
            input_ids=tuple(map(index, line["input_ids"])),
            answer=line["answer"],
            text=line["prompt"],
            row=line["row"],
            source=line.get("source"),
        ),
        response_ids=tuple(map(index, line["response_ids"])),
        rollout_logprobs=_per_token(line, "rollout_logprobs"),
        grade=Grade(_float(line["reward"]), line["warning"], _components(line)),
        versions=tuple(VersionSpan(*span) for span in line["versions"]),
        **fields,
    )


def _components(line: Mapping[str, Any]) -> dict[str, float]:
    terms = line.get("components", {})  # older files have none
    return {name: _float(value) for name, value in terms.items()}


def _per_token(line: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values, tokens = line[name], len(line["response_ids"])
    if len(values) != tokens:
        raise ValueError(f"{name} has {len(values)} entries for {tokens} response tokens")
    return tuple(map(_float, values))


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
