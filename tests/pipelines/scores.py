"""Given responses, scored by the command line, and through models that others built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state as mpu

from examples import policy_gradient
from megatron_bupo.pipelines import PhaseSchedule
from tests.runs import run

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from megatron_bupo.pipelines import PhaseController

VOCAB, TOKENS, RESPONSES = 64, 12, 8
MODEL = {"vocab": VOCAB, "hidden": 16, "ffn": 24, "scale": 0.12}  # small: fp32's noise is absolute
SCHEDULE = PhaseSchedule.of([(1, 1), (3, 1)])  # then the full policy
TP2_PP2 = {"tp": 2, "pp": 2}
TP2_PP2_VPP2 = TP2_PP2 | {"vpp": 2}


def responses() -> Tensor:
    """Token ids `[responses, tokens]`; a prompt is one token."""
    made = torch.Generator().manual_seed(4)
    return torch.randint(0, VOCAB, (RESPONSES, TOKENS), generator=made)


def by_command(
    model_dir: Path, folder: Path, policies: tuple[str, ...] = ("layer=1", "layer=3", "full")
) -> list[Tensor]:
    """What `megatron-bupo score` says of each policy: those of SCHEDULE, and the one after."""
    rows = [{"input_ids": ids, "prompt_length": 1} for ids in responses().tolist()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = []
    for policy in policies:
        out = folder / f"{policy}.jsonl"
        files = ["--model", model_dir, "--data", folder / "rows.jsonl", "--out", out]
        assert run("score", *files, "--policy", policy).code == 0
        found = [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]
        scores.append(torch.tensor(found))
    return scores


def by_model(chunks: list[Any], controller: PhaseController) -> list[Tensor]:
    """The same through a loop on plain Megatron-Core."""
    scores = []
    for step in range(3):
        controller.set_step(step)
        scores.append(policy_gradient.logprobs(chunks, {"input_ids": responses()})[:, :-1])
    return scores


def join(layout: dict[str, int]) -> None:
    """Be a rank of `layout`."""
    from megatron_bupo.config.layout import parallel_sizes
    from megatron_bupo.mcore import parallel
    from tests.mcore.actors import run_config

    world = layout["tp"] * layout["pp"]
    parallel.initialize(parallel_sizes(run_config(parallel=layout), world), seed=0)
    assert mpu.is_initialized()
