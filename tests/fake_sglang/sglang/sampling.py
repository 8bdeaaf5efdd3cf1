"""How a request wants its tokens drawn: the real checks, in the real words, and the draw."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# What the real one knows and this one does not.
NOT_HERE = (
    "stop stop_regex min_p frequency_penalty presence_penalty repetition_penalty json_schema regex "
    "ebnf structural_tag spaces_between_special_tokens stream_interval logit_bias custom_params "
    "beam_width watermark choice"
).split()


class BadRequest(Exception):
    """The request is answered with `status` and `body`."""

    def __init__(self, message: str, *, status: int = 400, plain: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message if plain else {"message": message}}


@dataclass(frozen=True)
class SamplingParams:
    """`sampling_params` of /generate, with its defaults."""

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_new_tokens: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> SamplingParams:
        """From JSON. A null means the default, except for max_new_tokens: as long as it goes."""
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known and name not in NOT_HERE:
                expected = ", ".join(f"`{name}`" for name in [*known, *NOT_HERE])
                message = f"unknown field `{name}`, expected one of {expected}"
                raise BadRequest(message, plain=True)
            if name in NOT_HERE and value is not None:
                raise BadRequest(f"the fake does not know sampling_params.{name}", status=501)
        kept: dict[str, Any] = {
            name: value
            for name, value in given.items()
            if name in known and (value is not None or name == "max_new_tokens")
        }
        for name, value in kept.items():
            if name != "stop_token_ids" and isinstance(value, str):
                raise BadRequest(f'invalid type: string "{value}", expected number', plain=True)
        kept["stop_token_ids"] = tuple(map(int, kept.get("stop_token_ids", ())))
        return cls(**kept)

    def verify(self) -> None:
        """The range checks that the real one makes, in its order."""
        t, most = self.temperature, self.max_new_tokens
        checks = {
            f"temperature must be a non-negative finite number, got {t}.": math.isfinite(t)
            and t >= 0,
            f"top_p must be in (0, 1], got {self.top_p}.": 0 < self.top_p <= 1,
            f"top_k must be -1 (disable) or at least 1, got {self.top_k}.": self.top_k >= 1
            or self.top_k == -1,
            f"min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}.": (
                self.min_new_tokens >= 0
            ),
            f"max_new_tokens must be at least 0, got {most}.": most is None or most >= 0,
            f"min_new_tokens must be in [0, max_new_tokens({most})], got {self.min_new_tokens}.": (
                most is None or self.min_new_tokens <= most
            ),
            f"sampling_seed must be in [-2**63, 2**63 - 1], got {self.sampling_seed}.": (
                -(2**63) <= (self.sampling_seed or 0) < 2**63
            ),
        }
        for message, fine in checks.items():
            if not fine:
                raise BadRequest(message)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Of every token `[..., vocab]` at the sampling temperature, whatever top-p and top-k."""
        greedy = self.temperature < 1e-6
        return torch.log_softmax(logits / (1.0 if greedy else self.temperature), dim=-1)

    def draw(self, logprobs: Tensor, generator: torch.Generator) -> int:
        """One token from `logprobs [vocab]`."""
        top_k = 1 if self.temperature < 1e-6 else self.top_k
        probs, order = logprobs.exp().sort(descending=True)
        if top_k != -1:
            probs = probs.masked_fill(torch.arange(len(probs)) >= top_k, 0)
        probs = probs.masked_fill(probs.cumsum(0) - probs > self.top_p, 0)
        return int(order[torch.multinomial(probs, 1, generator=generator)])
