"""The base model of the chain-sum bed: a Qwen3 of 260,000 parameters, taught by flawed examples.

It is an ordinary Hugging Face checkpoint, small enough to be made rather than downloaded.
"""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_bupo.bed.chain_sums import (
    CHARACTERS,
    END,
    PAD,
    PROMPT_TOKENS,
    TOKEN_IDS,
    TRAIN,
    demonstration,
    encode,
    prompt,
    save_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

LR = 2e-3
WARMUP_STEPS = 50
DEMONSTRATIONS_PER_STEP = 128


def save_base_model(directory: Path, *, steps: int = 500, seed: int = 0) -> None:
    """Train a base model into `directory`, with its tokenizer. Equal seeds, equal bits."""
    model = train_base_model(steps=steps, seed=seed)
    model.generation_config = GenerationConfig(
        eos_token_id=TOKEN_IDS[END], pad_token_id=TOKEN_IDS[PAD], do_sample=True
    )
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    save_tokenizer(directory)


def train_base_model(*, steps: int, seed: int) -> Qwen3ForCausalLM:
    """Teach a new model `steps` x 128 demonstrations of prompts drawn from the training prompts."""
    rng = random.Random(seed)
    console = Console(stderr=True)
    console.print(f"Making the base model: {steps} supervised steps, once")
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with _one_thread(), torch.random.fork_rng(devices=[]), progress:
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_model_config())
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        for step in progress.track(range(steps)):
            optimizer.param_groups[0]["lr"] = _lr(step, steps)
            loss = _loss(model, _demonstrations(rng))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def _model_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKEN_IDS[END],
        pad_token_id=TOKEN_IDS[PAD],
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: equal bits on any number of cores, and no barriers where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _lr(step: int, steps: int) -> float:
    """Linear warm-up times half a cosine."""
    return LR * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _demonstrations(rng: random.Random) -> Tensor:
    """Prompts with their flawed responses, `[demonstrations, tokens]`, right-padded."""
    drawn = [rng.choice(TRAIN) for _ in range(DEMONSTRATIONS_PER_STEP)]
    texts = [prompt(operands) + demonstration(operands, rng) for operands in drawn]
    longest = max(map(len, texts))
    return torch.tensor([encode(text.ljust(longest, PAD)) for text in texts])


def _loss(model: Qwen3ForCausalLM, input_ids: Tensor) -> Tensor:
    """Cross-entropy of the response tokens. Padding comes last: causal attention needs no mask."""
    responses = input_ids[:, PROMPT_TOKENS:]
    output = model(input_ids[:, :-1], use_cache=False, logits_to_keep=responses.shape[1])
    assert output.logits is not None
    return F.cross_entropy(
        output.logits.flatten(0, 1), responses.flatten(), ignore_index=TOKEN_IDS[PAD]
    )
