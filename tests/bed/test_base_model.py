from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bupo.bed import chain_sums
from megatron_bupo.bed.base_model import save_base_model, train_base_model
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check_against_model
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.types import Prompt, Sampling
from tests.bed.test_chain_sums import DEMO

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runs import Done


def accuracy(model_dir: Path, *, temperature: float, responses_per_prompt: int) -> float:
    """On the held-out prompts."""
    engine = EmbeddedEngine(model_dir, AutoTokenizer.from_pretrained(model_dir), batch_size=512)
    prompts = [
        Prompt(
            i,
            tuple(chain_sums.encode(text := chain_sums.prompt(operands))),
            str(sum(operands)),
            text,
        )
        for i, operands in enumerate(chain_sums.EVAL)
    ]
    sampling = Sampling(
        responses_per_prompt=responses_per_prompt,
        max_response_tokens=14,
        temperature=temperature,
        seed=0,
    )
    rewards = [
        chain_sums.reward(rollout.text, rollout.prompt.answer)
        for group in engine.generate(prompts, sampling)
        for rollout in group.rollouts
    ]
    return sum(rewards) / len(rewards)


def test_a_saved_base_model_is_a_small_tied_fp32_checkpoint_that_suits_the_demo(
    tmp_path: Path,
) -> None:
    save_base_model(tmp_path, steps=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_096
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == chain_sums.TOKEN_IDS["$"]
    check_against_model(load_config(str(DEMO), []), read_architecture(tmp_path))


def test_equal_seeds_make_equal_bits_and_disturb_nothing() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    models = [train_base_model(steps=2, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all((models[0][name] == models[1][name]).all() for name in models[0])
    assert any((models[0][name] != models[2][name]).any() for name in models[0])
    assert torch.get_num_threads() == threads
    assert (torch.get_rng_state() == state).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_base_model_is_right_about_a_quarter_of_the_time(demo: tuple[Done, Path]) -> None:
    model = demo[1] / ".cache" / "megatron_bupo" / "chain_sums" / "model"
    assert 0.23 < accuracy(model, temperature=1.0, responses_per_prompt=8) < 0.33
    assert 0.40 < accuracy(model, temperature=0.0, responses_per_prompt=1) < 0.65
