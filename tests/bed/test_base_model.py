from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from megatron_bupo.bed import chain_sums
from megatron_bupo.bed.base_model import save_base_model, train_base_model
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check_against_model
from megatron_bupo.hf.architecture import read_architecture
from tests.bed.test_chain_sums import DEMO

if TYPE_CHECKING:
    from pathlib import Path


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
