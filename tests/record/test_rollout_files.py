from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_bupo.data.packing import pack
from megatron_bupo.errors import InputError
from megatron_bupo.record.rollout_files import (
    find_steps,
    grouped,
    read_rollouts,
    step_file,
    write_rollouts,
)
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup
from tests.record.dumps import dump, learned, rollout, two_groups


def test_rollouts_are_read_back_to_the_bit(tmp_path: Path):
    groups, grades = two_groups()
    written = learned(groups)
    write_rollouts(tmp_path, 12, groups, grades, written)
    read = read_rollouts(tmp_path / "rollouts" / "step-000012.jsonl")
    flat = [r for group in groups for r in group.rollouts]
    for one, other in zip(read, flat, strict=True):
        assert [getattr(one, f.name) for f in fields(Rollout)] == [
            getattr(other, f.name) for f in fields(Rollout)
        ]
    assert [(r.step, r.policy, r.response) for r in read] == [
        (12, "internal layer 6", response) for response in (0, 1, 0, 1)
    ]
    assert [r.grade for r in read] == [grade for group in grades for grade in group]
    batch = written.batch
    assert written.scores is not None
    for name, tensor in (
        ("advantages", batch.advantages),
        ("old_logprobs", written.scores[0]),
        ("policy_entropies", written.scores[1]),
        ("ref_logprobs", batch.ref_logprobs),
    ):
        values = torch.tensor([x for r in read for x in getattr(r, name)])
        assert tensor is not None
        assert torch.equal(values, tensor[batch.response_mask])
    again = pack(grouped(read), 0)
    assert torch.equal(again.input_ids, batch.input_ids)
    assert torch.equal(again.rollout_logprobs, batch.rollout_logprobs)


def test_a_prompt_that_is_asked_twice_in_a_step_has_two_groups(tmp_path: Path):
    read = read_rollouts(step_file(dump(tmp_path, 0), 0))
    assert [len(group.rollouts) for group in grouped(read)] == [2, 2]


def test_what_is_not_finite_is_null_and_a_row_that_is_no_json_is_left_out(tmp_path: Path):
    prompt = Prompt(0, (1,), "", "", {"image": b"png"})
    odd = rollout(prompt, [1, 2], rollout_logprobs=(-math.inf, -0.5))
    write_rollouts(tmp_path, 0, [RolloutGroup(prompt, (odd,))], [[Grade(math.nan)]])
    line = json.loads(step_file(tmp_path, 0).read_text())
    assert (line["row"], line["rollout_logprobs"]) == (None, [None, -0.5])
    (read,) = read_rollouts(step_file(tmp_path, 0))
    assert math.isnan(read.rollout_logprobs[0])
    assert math.isnan(read.grade.reward)


def test_a_file_that_is_being_written_does_not_have_its_name(tmp_path: Path):
    groups, grades = two_groups()
    before = step_file(dump(tmp_path, 3), 3).read_bytes()
    broken = [*groups[0].rollouts[:1], replace(groups[0].rollouts[1], server=object())]  # type: ignore[arg-type]
    for step in (3, 4):
        with pytest.raises(TypeError):
            write_rollouts(tmp_path, step, [replace(groups[0], rollouts=tuple(broken))], grades[:1])
    assert find_steps(tmp_path).keys() == {3}
    assert step_file(tmp_path, 3).read_bytes() == before
    dump(tmp_path, 3, 4)
    assert find_steps(tmp_path / "rollouts").keys() == {3, 4}
    assert step_file(tmp_path, 3).read_bytes() != before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda line: line[:-9], "is no rollout ("),
        (lambda line: line.replace('"answer"', '"reply"'), "has no 'answer'; dump"),
        (
            lambda line: line.replace('"response_ids": [1, 14]', '"response_ids": [1]'),
            "is no rollout (entropies has 2 entries for 1 response tokens); dump",
        ),
        (lambda _: "[]", "is no rollout (not an object); dump"),
        (lambda _: "", "is no rollout ("),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, spoil, reason: str):
    file = step_file(dump(tmp_path, 0), 0)
    lines = file.read_text().splitlines()
    lines[1] = spoil(lines[1])
    file.write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_rollouts(file)
    assert str(error.value).startswith(f"{file}: line 2: {reason}")
