"""A response under way: what to ask a server for, and what its answers add up to.

A server may return early (its requests were aborted, it was paused): what it sampled is kept, and
the next request continues from there, with the prompt and the tokens so far as its input.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_bupo.types import Prompt, Rollout, Sampling, VersionSpan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron_bupo.types import FinishReason

NO_VERSION = -1  # what a server carries that nobody gave weights


class BadReply(Exception):
    """A server's answer is not what was asked for, or stale; nothing of it is used."""


def version_number(text: object) -> int:
    """The policy version that a server's weight version names."""
    return int(str(text)) if str(text).isdecimal() else NO_VERSION


def seed_of(sampling: Sampling, prompt: Prompt, response: int) -> int:
    """The seed of response `response` of `prompt`: equal wherever and whenever it is drawn."""
    words = np.random.SeedSequence((sampling.seed, prompt.index, response)).generate_state(1)
    return int(words[0] >> 1)  # SGLang hashes 32 bits of it


@dataclass
class Draft:
    """Response number `response` of `prompt`, as far as it has come."""

    prompt: Prompt
    response: int
    sampling: Sampling
    stop_ids: Sequence[int]
    vocab_size: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason = "abort"
    cached_tokens: int = 0
    attempts: int = 0
    server: str | None = None
    rid: str = ""

    @property
    def tokens_ahead(self) -> int:
        """How many tokens it may still cost, reading included."""
        limit = self.sampling.max_response_tokens
        return len(self.prompt.input_ids) + limit

    def request(self) -> dict[str, Any]:
        """The body of the next `/generate`, under a request id of its own."""
        self.rid = uuid.uuid4().hex
        sampling = self.sampling
        return {
            "rid": self.rid,
            "input_ids": [*self.prompt.input_ids, *self.ids],
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": sampling.max_response_tokens - len(self.ids),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "sampling_seed": seed_of(sampling, self.prompt, self.response),
                "stop_token_ids": [*self.stop_ids],
            },
        }

    def take(
        self, reply: Mapping[str, Any], *, version: int, oldest: int, tells_spans: bool
    ) -> None:
        """Add what a server sampled while its weights were `version`, or as its spans say.

        Raises:
            BadReply: it is not what was asked for, or older than `oldest`.
        """
        ids, meta = reply["output_ids"], reply["meta_info"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        reason = meta["finish_reason"]["type"]
        if len(logprobs) != len(ids) or [e[1] for e in meta["output_token_logprobs"]] != ids:
            raise BadReply(f"{len(ids)} tokens with {len(logprobs)} log-probs")
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise BadReply(f"a token outside the vocabulary: {max(ids)}")
        if len(self.ids) + len(ids) > self.sampling.max_response_tokens:
            raise BadReply(f"{len(ids)} tokens are more than were asked for")
        begin = len(self.ids)
        spans = meta.get("weight_versions") if tells_spans else None
        if spans is None:
            of_all = meta.get("weight_version", version)
            spans = [{"version": of_all, "start": 0, "end": len(ids)}]
        told = [
            VersionSpan(version_number(s["version"]), begin + s["start"], begin + s["end"])
            for s in spans
            if s["end"] > s["start"]
        ]
        if stale := [span.version for span in told if span.version < oldest]:
            raise BadReply(f"it answered with weights of version {stale[0]}, not {oldest}")
        self.versions += told
        self.ids += ids
        self.logprobs += logprobs
        self.cached_tokens = self.cached_tokens or int(meta.get("cached_tokens") or 0)
        self.finish_reason = reason
        if reason == "abort" and self.ids:  # and perhaps with what would have been its last token
            if self.ids[-1] in self.stop_ids:
                self.finish_reason = "stop"
            elif len(self.ids) == self.sampling.max_response_tokens:
                self.finish_reason = "length"

    def rollout(self, text: str, *, version: int) -> Rollout:
        """The response as it is; `version` is the one it was asked of."""
        return Rollout(
            prompt=self.prompt,
            response_ids=tuple(self.ids),
            text=text,
            rollout_logprobs=tuple(self.logprobs),
            entropies=None,
            finish_reason=self.finish_reason,
            policy_version=self.versions[0].version if self.versions else version,
            versions=tuple(_joined(self.versions)),
            cached_tokens=self.cached_tokens,
            server=self.server,
            attempts=self.attempts,
        )


def _joined(spans: Sequence[VersionSpan]) -> list[VersionSpan]:
    """Neighbours of one version as one."""
    joined: list[VersionSpan] = []
    for span in spans:
        if joined and joined[-1].version == span.version:
            joined[-1] = joined[-1]._replace(end=span.end)
        else:
            joined.append(span)
    return joined
