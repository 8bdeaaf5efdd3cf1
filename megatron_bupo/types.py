"""What travels between the rooms of the house: plain frozen records, no torch at import time.

A worked example, two prompts with two responses each (`|` marks where the response begins)::

    Prompt(index=7, input_ids=(4, 10, 9, 11), answer="13", text="4+9=")
    Rollout(prompt, response_ids=(1, 3, 14), text="13$", finish_reason="stop", ...)
    RolloutGroup(prompt, (rollout, rollout))                    # `responses_per_prompt` of them

    TokenBatch  input_ids       [[4, 10, 9, 11 | 1,  3, 14],    # [responses, tokens], right-padded
                                 [4, 10, 9, 11 | 2, 14,  0], ...]
                response_mask   [[0,  0, 0,  0 | 1,  1,  1],    # True on response tokens
                                 [0,  0, 0,  0 | 1,  1,  0], ...]

Every `[responses, tokens]` tensor is aligned with `input_ids`: entry `[i, t]` speaks of token `t`
of response `i`. So `logprobs[i, t]` is the log-probability (nats) of that token given the tokens
before it, and is defined where `response_mask[i, t]` is True; elsewhere it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One question. `index` is its row in the data and identifies it for good; the rows of a
    mixture are counted through its sources.
    """

    index: int
    input_ids: tuple[int, ...]
    answer: str
    text: str
    row: Mapping[str, Any] | None = None  # the whole data row, for reward functions that ask for it
    source: str | None = None  # of a mixture: the name of the one that it is from


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Equal `seed`s draw equal responses, whatever the number of ranks."""

    responses_per_prompt: int
    max_response_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0


class VersionSpan(NamedTuple):
    """Response tokens `[start, end)` were sampled with the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One prompt with one sampled response."""

    prompt: Prompt
    response_ids: tuple[int, ...]  # includes the stop token where finish_reason is "stop"
    text: str  # the response decoded, without special tokens
    rollout_logprobs: tuple[float, ...]  # nats, per response token, under the sampling distribution
    # nats, of the distributions that the tokens were drawn from; None: the engine does not say
    entropies: tuple[float, ...] | None
    finish_reason: FinishReason  # abort: cut by a budget
    policy_version: int  # steps that the weights had learned from when the first token was drawn
    versions: tuple[VersionSpan, ...] = ()  # more than one: the weights changed under way
    cached_tokens: int = 0  # of the prompt, found in the server's prefix cache
    server: str | None = None  # address of the one that finished it
    attempts: int = 1  # requests that it took


@dataclass(frozen=True)
class RolloutGroup:
    """All rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Grade:
    """A grader's verdict on one rollout. A grader that failed or hung leaves reward 0 and says
    why.
    """

    reward: float
    warning: str | None = None
    # The terms of a composed reward by name, before they are weighed; none of a single function
    components: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def correctness(self) -> float:
        """Is the response right? What accuracy counts: the first term, or else the reward."""
        return next(iter(self.components.values()), self.reward)


@dataclass(frozen=True)
class TokenBatch:
    """Responses as tensors, ready for the actor; all fields `[responses, tokens]`, aligned with
    `input_ids`.
    """

    input_ids: Tensor  # int64, right-padded
    response_mask: Tensor  # bool
    rollout_logprobs: Tensor  # fp32, nats
    advantages: Tensor | None = None  # fp32
    # fp32, nats; of the policy that this step trains, before its first update; None: it has but one
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None  # fp32, nats; of the same policy with the initial weights
    learns: Tensor | None = None  # bool; None: every response token does
    values: Tensor | None = None  # fp32; the critic's before its first update
    returns: Tensor | None = None  # fp32; what the critic learns to foresee

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def response_tokens(self) -> int:
        """Number of response tokens in the batch."""
        return int(self.response_mask.sum())

    def rows(self, index: Any) -> TokenBatch:
        """The batch of the responses `index` (a slice or an index tensor)."""
        picked: dict[str, Any] = {
            f.name: None if (value := getattr(self, f.name)) is None else value[index]
            for f in fields(self)
        }
        return replace(self, **picked)

    def minibatches(self, count: int) -> list[TokenBatch]:
        """The batch cut into `count` equal parts, in order."""
        size = len(self) // count
        return [self.rows(slice(start, start + size)) for start in range(0, size * count, size)]

    def with_old_logprobs(self, old_logprobs: Tensor) -> TokenBatch:
        """The same batch with the log-probs that the ratio divides by, `[responses, tokens]`
        nats.
        """
        return replace(self, old_logprobs=old_logprobs)

    def with_ref_logprobs(self, ref_logprobs: Tensor) -> TokenBatch:
        """The same batch with the reference's log-probs, `[responses, tokens]` nats."""
        return replace(self, ref_logprobs=ref_logprobs)

    def with_values(self, values: Tensor) -> TokenBatch:
        """The same batch with the critic's values, `[responses, tokens]`."""
        return replace(self, values=values)

    def with_returns(self, returns: Tensor) -> TokenBatch:
        """The same batch with what its tokens came to earn, `[responses, tokens]`."""
        return replace(self, returns=returns.float() * self.learning_mask)

    @property
    def learning_mask(self) -> Tensor:
        """The response tokens that learn, bool."""
        return self.response_mask if self.learns is None else self.learns

    def with_learners(self, responses: Tensor) -> TokenBatch:
        """The same batch, of which only `responses` (bool `[responses]`) learn."""
        return replace(self, learns=self.response_mask & responses.unsqueeze(1))

    def of_learners(self) -> TokenBatch:
        """The batch as if what does not learn were no response at all."""
        return replace(self, response_mask=self.learning_mask, learns=None)

    def with_advantages(self, advantages: Tensor) -> TokenBatch:
        """The same batch with its advantages: one for all tokens of a response, `[prompts,
        responses_per_prompt]`, or one for each token, `[responses, tokens]`.
        """
        if advantages.shape != self.input_ids.shape:
            if advantages.numel() != len(self):
                raise ValueError(f"{advantages.numel()} advantages for {len(self)} responses")
            advantages = advantages.reshape(-1, 1)
        return replace(self, advantages=advantages.float() * self.learning_mask)


class Weights(Protocol):
    """Named full tensors of a model that is spread over ranks; may be gone through again.

    Every rank goes through it at the same time: each tensor is gathered for the moment that it is
    looked at.
    """

    stages: int  # pipeline stages that each hold a part
    stage: int  # the one that this rank belongs to
    sends: bool  # is this rank the one that speaks for its stage?

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of all of them, on every rank. Collective."""
        ...

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """Those that this rank's stage holds, on the ranks of the stage. Collective among them."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """What one `load_weights` cost. Bytes and seconds of the whole, over all ranks."""

    sent_bytes: int  # to one server
    seconds: float
    recovered: int = 0  # servers that had missed an update and have it now
    behind: int = 0  # servers that missed this one


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer update did; all numbers are global over ranks and micro-batches."""

    metrics: Mapping[str, float]  # `update/...`
    # Log-probs and entropies before the update, `[responses, tokens]` nats, of a minibatch that
    # came without old log-probs
    scores: tuple[Tensor, Tensor] | None = None
