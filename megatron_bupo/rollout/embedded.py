"""Rollouts without a server: the model in transformers, inside the trainer's own processes.

Ranks share the responses out, each decodes its own with a key-value cache, and all gather all of
them. It is what a laptop uses; every rank holds a whole copy of the model.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_bupo import collective
from megatron_bupo.algorithm.bupo import InternalLayerPolicy, depth_of
from megatron_bupo.rollout.decoding import Response, decode
from megatron_bupo.rollout.engine import Capabilities, Pending, ServerHealth
from megatron_bupo.rollout.reading import check_prompt, stop_ids, text_of
from megatron_bupo.rollout.sampling import uniforms
from megatron_bupo.types import Prompt, Rollout, RolloutGroup, Sampling, SyncReport, VersionSpan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from megatron_bupo.algorithm.bupo import Policy


class _Request(NamedTuple):
    """Response number `response` of the prompt in place `place` of the list."""

    place: int
    response: int


class EmbeddedEngine:
    """A `RolloutEngine` on transformers."""

    def __init__(
        self,
        model_dir: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load `model_dir` in `dtype`; decode `batch_size` responses at a time, per rank."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        transformers_logging.disable_progress_bar()  # the terminal is the run's own display's
        # `dtype=` rather than `.to(dtype)`, which also rounds the rotary frequencies.
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True
        )
        self.model: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        ids = stop_ids(model_dir, tokenizer)
        self.stop_ids = torch.tensor(ids, dtype=torch.long, device=device)
        self.version = 0
        backbone: Any = model.model
        self._layers: nn.ModuleList = backbone.layers
        self._norm: nn.Module = backbone.norm
        self._places = _places(self.model)  # of all layers, whichever of them run

    def wait_until_up(self, say: Callable[[str], None]) -> None:
        """There is nothing to wait for."""

    def capabilities(self) -> Capabilities:
        """Equal seeds draw equal responses, on any number of ranks."""
        return Capabilities(
            name="embedded",
            ahead=False,
            entropies=True,
            internal_policies=True,
            reproducible=True,
        )

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> Pending:
        """Generates when asked to `collect`: the trainer's processes are this engine's too."""
        return _Later(self, prompts, sampling)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """A group per prompt, in order, the same on every rank."""
        for prompt in prompts:
            check_prompt(
                prompt,
                context=self.model.config.max_position_embeddings,
                vocab_size=self.model.config.vocab_size,
                max_response_tokens=sampling.max_response_tokens,
            )
        group_size = sampling.responses_per_prompt
        requests = [
            _Request(place, response)
            for place in range(len(prompts))
            for response in range(group_size)
        ]
        mine = self._respond(prompts, collective.share(requests), sampling)
        responses = iter(collective.gather(mine))
        return [
            RolloutGroup(
                prompt, tuple(self._rollout(prompt, next(responses)) for _ in range(group_size))
            )
            for prompt in prompts
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """Take over `(hf_name, full tensor)` pairs; what is not in the stream stays as it is."""
        began, taken, own = time.monotonic(), 0, self._places
        for name, tensor in weights:
            if name not in own:
                raise KeyError(f"{name} is no weight of {type(self.model).__name__}")
            if own[name].shape != tensor.shape:  # copy_ would broadcast
                raise ValueError(f"{name} is {[*tensor.shape]}, the model's {[*own[name].shape]}")
            own[name].copy_(tensor)
            taken += tensor.nbytes
        self.version = version
        return SyncReport(sent_bytes=taken, seconds=time.monotonic() - began)

    def pause(self) -> AbstractContextManager[None]:
        """Nothing is ever under way."""
        return nullcontext()

    def sample_from(self, policy: Policy) -> None:
        """Run the layers that `policy` reads, and none above."""
        layers = len(self._layers)
        internal = isinstance(policy, InternalLayerPolicy)
        if internal and not 1 <= policy.layer < layers:
            raise ValueError(f"{policy} of a model with {layers} layers: choose 1..{layers - 1}")
        backbone: Any = self.model.model
        backbone.layers = self._layers[: depth_of(policy, layers)]
        raw = internal and not policy.read_out_norm
        backbone.norm = nn.Identity() if raw else self._norm

    def health(self) -> list[ServerHealth]:
        """This process."""
        return [ServerHealth("embedded", "ready", self.version)]

    def close(self) -> None:
        """Free the model."""
        del self.model, self._layers, self._norm, self._places

    def _respond(
        self, prompts: Sequence[Prompt], requests: Sequence[_Request], sampling: Sampling
    ) -> list[Response]:
        """Responses to `requests`, in order; prompts of like lengths are decoded together."""
        order = sorted(
            range(len(requests)), key=lambda i: len(prompts[requests[i].place].input_ids)
        )
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            decoded = self._decode(prompts, [requests[i] for i in batch], sampling)
            responses.update(zip(batch, decoded, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _decode(
        self, prompts: Sequence[Prompt], requests: Sequence[_Request], sampling: Sampling
    ) -> list[Response]:
        """The responses of one batch."""
        places = sorted({request.place for request in requests})
        noise = [
            uniforms(
                seed=sampling.seed,
                prompt=prompts[request.place].index,
                response=request.response,
                count=sampling.max_response_tokens,
            )
            for request in requests
        ]
        return decode(
            self.model,
            [prompts[place].input_ids for place in places],
            [places.index(request.place) for request in requests],
            torch.from_numpy(np.stack(noise)).to(self.model.device),
            stop_ids=self.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )

    def _rollout(self, prompt: Prompt, response: Response) -> Rollout:
        return Rollout(
            prompt=prompt,
            response_ids=response.token_ids,
            text=text_of(response.token_ids, self.tokenizer),
            rollout_logprobs=response.logprobs,
            entropies=response.entropies,
            finish_reason="stop" if response.stopped else "length",
            policy_version=self.version,
            versions=(VersionSpan(self.version, 0, len(response.token_ids)),),
        )


class _Later:
    """Responses that are generated when asked for."""

    def __init__(
        self, engine: EmbeddedEngine, prompts: Sequence[Prompt], sampling: Sampling
    ) -> None:
        self.generate = partial(engine.generate, prompts, sampling)

    def collect(self) -> list[RolloutGroup]:
        return self.generate()


# transformers 5 stacks the matrices of all experts of a layer, these on top of each other.
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _places(model: PreTrainedModel) -> dict[str, Tensor]:
    """HF name on disk -> where that tensor lies in `model`."""
    places: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied: two names
        block, _, stacked = name.partition(".experts.")
        if stacked not in _STACKED:
            places[name] = parameter
            continue
        kinds = _STACKED[stacked]
        for e, expert in enumerate(parameter):
            for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                places[f"{block}.experts.{e}.{kind}.weight"] = part
    return places
