"""A loop on plain Megatron-Core that two lines make BuPO, held against our own trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.mcore import model
from megatron_bupo.types import TokenBatch
from tests.mcore.actors import run_config, start_trainer
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from megatron_bupo.mcore.trainer import MegatronTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "DP2 distributed optimizer": (2, {"dp": 2, "distributed_optimizer": True}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
}
INTERNAL = InternalLayerPolicy(2)  # for two steps, as the patch has it


@pytest.fixture(scope="module")
def bupo_loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its two lines."""
    root = tmp_path_factory.mktemp("loop")
    (root / "examples").mkdir()
    source = (EXAMPLES / "policy_gradient.py").read_text()
    (root / "examples" / "policy_gradient.py").write_text(source)
    patch = str(EXAMPLES / "policy_gradient_bupo.patch")
    subprocess.run(["git", "apply", patch], cwd=root, check=True)
    return root / "examples" / "policy_gradient.py"


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bupo_loop", path)
    assert spec is not None
    assert spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    return loop


def _rollouts(vocab: int, responses: int = 8, tokens: int = 16) -> list[TokenBatch]:
    made = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(4):
        ids = torch.randint(0, vocab, (responses, tokens), generator=made)
        mask = torch.zeros(responses, tokens, dtype=torch.bool)
        for row in range(responses):
            mask[row, 1 + row % 4 : tokens - row % 3] = True
        advantages = torch.randn(responses, 1, generator=made).expand(responses, tokens)
        batches.append(TokenBatch(ids, mask, torch.zeros(ids.shape), advantages.contiguous()))
    return batches


def _as_the_loop_wants_it(batch: TokenBatch, rank: int, ranks: int) -> dict[str, Tensor]:
    """This rank's responses, in which a place speaks of the token after it."""
    assert batch.advantages is not None
    columns = {"mask": batch.response_mask.float(), "advantages": batch.advantages}
    mine = {name: column.roll(-1, 1)[rank::ranks] for name, column in columns.items()}
    return {"input_ids": batch.input_ids[rank::ranks], **mine}


def _build(loop: ModuleType, trainer: MegatronTrainer, **sharing: Any) -> tuple[Any, Any]:
    """The loop's own model, with the trainer's weights, and its optimizer."""
    arch, [ours] = trainer.arch, trainer.gpt_chunks
    assert isinstance(arch, Architecture)
    config = model.transformer_config(arch, trainer.config)
    config.perform_initialization = True  # in vain, but it marks which parameters are shards
    chunks, optimizer = loop.build(config, arch.vocab_size, tied=arch.tied, **sharing)
    chunks[0].module.load_state_dict(ours.state_dict())
    chunks[0].module.rotary_pos_emb.inv_freq = ours.rotary_pos_emb.inv_freq
    return chunks, optimizer


def _parameters(chunk: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in chunk.named_parameters()}


def _gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5


def _by_trainer(trainer: MegatronTrainer, batches: list[TokenBatch]) -> list[dict[str, Any]]:
    """What four steps of BuPO do: two of an internal policy, two of the full one."""
    steps = []
    for step, batch in enumerate(batches):
        policy = INTERNAL if step < 2 else FULL
        before, _ = trainer.logprobs(batch, policy)
        for _ in range(2):
            report = trainer.update(batch.with_old_logprobs(before), policy, lr=1e-3)
        trainer.gather_parameters()
        steps.append(
            {
                "logprobs": before,
                **report.metrics,
                "weights": _parameters(trainer.gpt_chunks[0]),
                "gradients": {
                    name: p.main_grad.clone()
                    for name, p in trainer.gpt_chunks[0].named_parameters()
                },
            }
        )
    return steps


def _both(path: Path, model_dir: Path, layout: dict[str, Any]) -> dict[str, Any]:
    loop, batches = _import(path), _rollouts(64)
    trainer = start_trainer(model_dir, run_config(parallel=layout, optimizer={"clip_grad": 1.0}))
    sharded = {"use_distributed_optimizer": layout.get("distributed_optimizer", False)}
    loops = [_build(loop, trainer, **sharded) for _ in range(2)]
    initial = _parameters(trainer.gpt_chunks[0])
    ours = _by_trainer(trainer, batches)
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    mine = [_as_the_loop_wants_it(batch, rank, ranks) for batch in batches]
    gaps: dict[str, float] = {}
    for steps, (chunks, optimizer) in zip((2, 4), loops, strict=True):
        reports = loop.train(chunks, optimizer, mine[:steps])
        theirs, last = _parameters(chunks[0].module), ours[steps - 1]
        moves = _distance(last["weights"], initial)
        gaps[f"weights after {steps}"] = _distance(last["weights"], theirs) / moves
        if not layout.get("distributed_optimizer"):
            gradients = {n: p.main_grad for n, p in chunks[0].module.named_parameters()}
            gaps[f"gradients of {steps}"] = _gap(last["gradients"], gradients)
        for step, before, grad_norm, sums, moved in reports:
            assert moved == [
                layer for layer in (1, 2, 3, 4) if step >= 2 or layer <= INTERNAL.layer
            ]
            known, mask = ours[step]["logprobs"][rank::ranks], batches[step].response_mask
            found = before.roll(1, 1) * mask[rank::ranks]
            gaps[f"log-probs of {steps}, {step}"] = float((known - found).abs().max())
            gaps[f"norm of {steps}, {step}"] = abs(ours[step]["update/grad_norm"] - grad_norm)
            total = sum(part["loss"] for part in sums)
            if sums and ranks == 1:
                loss = float(total[0] / total[1])
                gaps[f"loss of {steps}, {step}"] = abs(ours[step]["update/loss"] - loss)
        if steps == 2:
            frozen = _above(chunks[0].module)
            for name, p in chunks[0].module.named_parameters():
                assert torch.equal(p, initial[name]) == (name in frozen), name
            assert frozen or not mpu.is_pipeline_last_stage()
    return gaps


def _above(chunk: Any) -> set[str]:
    """The parameters of `chunk` that INTERNAL does not reach."""
    found = {n for n, _ in chunk.named_parameters() if n.startswith("decoder.final_layernorm.")}
    for at, layer in enumerate(chunk.decoder.layers):
        if layer.layer_number > INTERNAL.layer:
            found |= {f"decoder.layers.{at}.{name}" for name, _ in layer.named_parameters()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "tied"),
    [("one rank", False), ("DP2 distributed optimizer", False), ("TP2 PP2", True)],
)
def test_two_lines_make_somebody_elses_loop_do_what_our_trainer_does(
    layout: str, tied: bool, bupo_loop: Path, tiny_model_dir: Callable[..., Path]
):
    ranks, parallel = LAYOUTS[layout]
    model_dir = tiny_model_dir(family="llama", vocab=64, scale=0.12, tied=tied)
    for gaps in run_ranks(ranks, _both, bupo_loop, model_dir, parallel):
        weights = {name: gap for name, gap in gaps.items() if name.startswith("weights")}
        assert max(weights.values()) < 3e-4  # of how far they moved
        assert max(gap for name, gap in gaps.items() if name not in weights) < 2e-5


@pytest.mark.slow
def test_the_example_runs_as_it_says_and_shows_which_layers_move(bupo_loop: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(bupo_loop), "--pp", "2"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [line.partition(" moved")[0] for line in ran.stdout.splitlines()]
    internal, full = "layers 1, 2", "layers 1, 2, 3, 4"
    assert shown == [f"step {i}: {internal if i < 2 else full}" for i in range(4)]
