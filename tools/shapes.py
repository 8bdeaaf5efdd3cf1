"""A random model and a random batch for it, of any size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.types import TokenBatch


@dataclass(frozen=True)
class Shape:
    """Sizes of both."""

    layers: int = 12
    hidden: int = 128
    ffn: int = 384
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 1024
    responses: int = 16
    prompt_tokens: int = 16
    response_tokens: int = 48

    @property
    def depths(self) -> list[int]:
        """The depths to measure: a sixth, half, five sixths and all of the layers."""
        return sorted({max(1, self.layers * sixths // 6) for sixths in (1, 3, 5, 6)})

    def policy(self, depth: int) -> Policy:
        """The policy that runs `depth` layers."""
        return FULL if depth == self.layers else InternalLayerPolicy(depth)

    def write_model(self, directory: Path) -> None:
        """A Qwen3 checkpoint with random weights, the same ones each time."""
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.prompt_tokens + self.response_tokens,
            tie_word_embeddings=True,
        )
        Qwen3ForCausalLM(config).save_pretrained(directory)

    def batch(self) -> TokenBatch:
        """Random responses of full length, each with one advantage."""
        tokens = self.prompt_tokens + self.response_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab, (self.responses, tokens), generator=generator)
        mask = (torch.arange(tokens) >= self.prompt_tokens).expand_as(ids)
        advantages = torch.randn(self.responses, 1, generator=generator) * mask
        return TokenBatch(ids, mask, torch.zeros(ids.shape), advantages)
