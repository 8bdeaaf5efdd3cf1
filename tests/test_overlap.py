"""A run whose next rollouts are generated while it trains, on a server, over a phase switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_bupo.data.order import PromptStream
from megatron_bupo.record.rollout_files import RecordedRollout, read_rollouts
from megatron_bupo.types import Prompt
from tests.rollout.fake import fake_server
from tests.runs import Bed, metrics

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

AHEAD = (
    "rollout.engine=sglang",
    "rollout.max_staleness=1",
    "rollout.overlap_phases=full",
    "bupo.internal_steps=2",
    "debug.dump_rollouts=true",
    "parallel.pp=1",
    "evaluation.every=0",
    "data.eval=null",
    "checkpoint.export_hf=false",
)
ROWS, PROMPTS, RESPONSES = 48, 4, 4  # of the bed


@pytest.fixture(scope="module")
def overlapped(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, resumed after four."""
    folder = tmp_path_factory.mktemp("overlapped")
    for steps in (4, 6):
        with fake_server(bed.folder / "model", folder / f"server {steps}") as fake:
            to = f"servers.addresses=[{fake.url}]"
            bed.train(folder / "run", *AHEAD, to, f"steps={steps}")
    return folder / "run"


def rollouts(run_dir: Path, step: int) -> list[RecordedRollout]:
    return read_rollouts(run_dir / "rollouts" / f"step-{step:06d}.jsonl")


def test_full_steps_are_begun_one_step_early_and_internal_and_resumed_ones_are_on_policy(
    overlapped: Path,
):
    """The version of each response is the server's own word. How much it draws before the sync is
    up to it.
    """
    oldest = []
    for step, line in enumerate(metrics(overlapped)):
        behind = [step - rollout.policy_version for rollout in rollouts(overlapped, step)]
        assert len(behind) == PROMPTS * RESPONSES
        assert line["rollout/staleness_max"] == max(behind)
        assert line["rollout/staleness_mean"] == sum(behind) / len(behind)
        oldest.append(max(behind))
    assert [n <= most for n, most in zip(oldest, [0, 0, 1, 1, 0, 1], strict=True)] == [True] * 6
    assert max(oldest) == 1


def test_only_full_steps_weigh_their_tokens_and_only_stale_ones_not_alike(overlapped: Path):
    lines = metrics(overlapped)
    for line in lines:
        assert ("update/tis_weight_mean" in line) == (line["policy"] == "full")
    for line in lines[2:]:
        stale = line["rollout/staleness_max"] > 0
        assert (line["update/tis_weight_mean"] == pytest.approx(1, abs=1e-5)) != stale
        assert (line["rollout/logprob_gap_max_nats"] < 1e-5) != stale


def test_the_trainer_tells_the_full_policys_entropy_where_it_looks_at_it(overlapped: Path):
    """Servers do not, and the second internal step has no reason to."""
    told = ["entropy/full_nats" in line for line in metrics(overlapped)]
    assert told == [True, False, True, True, True, True]


def test_every_step_asks_what_it_would_ask_without_overlap_or_interruption(overlapped: Path):
    rows = [Prompt(i, (), "", "") for i in range(ROWS)]
    stream = PromptStream(rows, prompts_per_step=PROMPTS, seed=0)
    for step in range(6):
        asked = [rollout.prompt.index for rollout in rollouts(overlapped, step)]
        assert asked == [p.index for p in stream.prompts_at(step) for _ in range(RESPONSES)]
