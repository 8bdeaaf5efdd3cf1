"""How much work is a step? Responses and their lengths, and how they fall into micro-batches.

The longest a response may get is a setting; the mean is an assumption, half of it unless said
otherwise. Memory is planned for responses that are all as long as they may be, time for the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config


@dataclass(frozen=True)
class Workload:
    """One step; tokens of one response each."""

    prompts: int
    responses: int  # of all prompts
    prompt_tokens: float  # mean
    response_tokens: float  # mean
    longest_response: int
    longest: int  # prompt and response

    @property
    def tokens(self) -> float:
        """Of all prompts and responses, as they are trained."""
        return self.responses * (self.prompt_tokens + self.response_tokens)

    @property
    def response_share(self) -> float:
        """Of the tokens."""
        return self.response_tokens / (self.prompt_tokens + self.response_tokens)

    @property
    def context(self) -> float:
        """Tokens that a token looks back at, in the mean."""
        return (self.prompt_tokens + self.response_tokens) / 2


def workload_of(
    config: Config, *, prompt_tokens: int | None = None, response_tokens: int | None = None
) -> Workload:
    """A step of `config`; the means where they are known, else half of what is allowed."""
    rollout, most = config.rollout, config.data.max_prompt_tokens
    return Workload(
        prompts=rollout.prompts_per_step,
        responses=rollout.prompts_per_step * rollout.responses_per_prompt,
        prompt_tokens=prompt_tokens or most / 2,
        response_tokens=response_tokens or rollout.max_response_tokens / 2,
        longest_response=rollout.max_response_tokens,
        longest=most + rollout.max_response_tokens,
    )


@dataclass(frozen=True)
class Microbatches:
    """How a minibatch is worked through by a data-parallel rank."""

    count: int
    tokens: float  # of each, over all context-parallel ranks


def microbatches(
    config: Config, layout: Layout, *, responses: float, length: float
) -> Microbatches:
    """Of `responses` of `length` tokens each, by the rule of mcore/microbatches.py."""
    trainer, tokens = config.trainer, responses * length
    count = max(layout.pp, -(-tokens // (layout.dp * trainer.max_tokens_per_microbatch)))
    if trainer.microbatch_size is not None:
        count = max(count, -(-responses // (layout.dp * trainer.microbatch_size)))
    if layout.vpp > 1:
        count = -(-count // layout.pp) * layout.pp
    return Microbatches(int(count), max(tokens / (layout.dp * count), min(length, tokens)))
