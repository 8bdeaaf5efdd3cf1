"""Requests, and the thread that draws one token for all that run, over and over.

Two layers, as in the real one. The gate (its tokenizer manager) lets requests in: none while
generation is paused, none while weights change without a pause, and such a change waits until all
that are in have finished. Behind it the scheduler holds requests that wait or run, and does
everything under one lock: nothing happens in the middle of a token.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglang.faults import FAULTS, die
from sglang.model import Model
from sglang.sampling import BadRequest, SamplingParams

SENT_EVERY = 50  # tokens, from scheduler to tokenizer manager; what waits there survives an abort
CACHED_SEQUENCES = 64


@dataclass(eq=False)
class Request:
    """One prompt on its way to one response."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    logprob_start: int  # -1: none of the prompt
    asked: int | None  # response tokens, if it says so itself
    limit: int = 0  # those that fit
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)  # (old one, tokens until then)
    cache: Tensor | None = None  # keys and values; None: it waits
    cached_tokens: int = 0
    retractions: int = 0
    lost: bool = False  # aborted while it waited
    aborted: bool = False  # to be finished after one more token
    finish: dict[str, Any] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    born: float = field(default_factory=time.perf_counter)


class Scheduler:
    """The model, its requests, and whether it may work at them."""

    def __init__(
        self,
        model: Model,
        *,
        version: str,
        eos: frozenset[int],
        context: int,
        deterministic: bool,
        seed: int,
    ) -> None:
        self.model, self.eos, self.context = model, eos, context
        self.weight_version = version
        self.deterministic = deterministic
        self.generator = torch.Generator().manual_seed(seed)
        self.lock = threading.Condition()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.known: dict[str, Request] = {}  # by rid, from arrival to answer
        self.engine_paused = False
        self.is_pause = False
        self.readers = 0  # HTTP requests that are in
        self.writers = 0  # weight updates that wait for them to leave, or are at work
        self.released: set[str] = set()
        self.prefixes: list[tuple[list[int], Tensor]] = []
        self.last_output = 0.0
        self.healthy = True
        threading.Thread(target=self._loop, daemon=True).start()

    # --- the gate ---

    def generate(self, requests: list[Request], connected: Callable[[], bool]) -> None:
        """Have all of them answered; ConnectionError once the client is gone."""
        self._register(requests)
        try:
            self._enter(connected)
            try:
                for request in requests:
                    self._validate(request)
                with self.lock:
                    self.waiting += requests
                    self.lock.notify_all()
                for request in requests:
                    while not request.done.wait(0.25):
                        if not connected():
                            self.abort(request.rid)
                            raise ConnectionError("Request is disconnected from the client side")
            finally:
                with self.lock:
                    self.readers -= 1
                    self.lock.notify_all()
        finally:
            with self.lock:
                for request in requests:
                    del self.known[request.rid]

    def _register(self, requests: list[Request]) -> None:
        with self.lock:
            for i, request in enumerate(requests):
                if request.rid in self.known or request.rid in {r.rid for r in requests[:i]}:
                    raise BadRequest(f"Duplicate request ID detected: {request.rid}")
            self.known |= {request.rid: request for request in requests}

    def _enter(self, connected: Callable[[], bool]) -> None:
        with self.lock:
            while self.is_pause or self.writers:
                self.lock.wait(0.25)
                if not connected():
                    raise ConnectionError("Request is disconnected from the client side")
            self.readers += 1

    def _validate(self, request: Request) -> None:
        length, asked = len(request.prompt), request.asked
        if length >= self.context:
            raise BadRequest(
                f"The input ({length} tokens) is longer than the model's context length "
                f"({self.context} tokens)."
            )
        if asked is not None and asked + length > self.context:
            raise BadRequest(
                f"Requested token count exceeds the model's maximum context length of "
                f"{self.context} tokens. You requested a total of {asked + length} tokens: {length}"
                f" tokens from the input messages and {asked} tokens for the completion. Please "
                f"reduce the number of tokens in the input messages or the completion to fit "
                f"within the limit."
            )
        request.params.verify()
        if length >= self.context - 6:
            raise BadRequest(
                f"Input length ({length} tokens) exceeds the maximum allowed length "
                f"({self.context - 6} tokens). Use a shorter input or enable --allow-auto-truncate."
            )
        # Two less than the context, whatever was asked for, and nobody is told.
        most = request.params.max_new_tokens
        request.limit = max(
            0, min(self.context if most is None else most, self.context - 2 - length)
        )
        if any(not 0 <= token < self.model.vocab for token in request.prompt):
            die(f"token ids {request.prompt} outside a vocabulary of {self.model.vocab}")

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The scheduler for oneself: at once while paused, else when all that are in have left."""
        with self.lock:
            if not self.is_pause:
                self.writers += 1
                try:
                    while self.readers and not self.is_pause:
                        self.lock.wait()
                    yield
                finally:
                    self.writers -= 1
                    self.lock.notify_all()
            else:
                yield

    def pause(self, mode: str) -> None:
        """Let nobody in; abort: and cut what runs; else stop the scheduler, which with `retract`
        forgets the keys and values of what runs.
        """
        with self.lock:
            self.is_pause = True
            self.engine_paused |= mode != "abort"
            if mode == "retract":
                for request in self.running:
                    request.cache = None
                    request.retractions += 1
                self.waiting += self.running
                self.running = []
            while mode == "abort" and self.readers:
                self.abort(everything=True)
                self.lock.wait(0.1)

    def resume(self) -> None:
        with self.lock:
            self.is_pause = self.engine_paused = False
            self.lock.notify_all()

    def abort(self, rid: str = "", *, everything: bool = False) -> None:
        """Cut the request `rid`, if it is known, and all whose id begins like that."""
        with self.lock:
            if not everything and rid not in self.known:
                return
            for request in [r for r in self.waiting if everything or r.rid.startswith(rid)]:
                self.waiting.remove(request)
                request.lost = True
                request.finish = {"type": "abort", "message": "Abort in waiting queue"}
                request.done.set()
            for request in self.running:
                request.aborted |= everything or request.rid.startswith(rid)

    # --- the scheduler ---

    def set_version(self, version: str | None) -> None:
        """The weights are `version` from here on."""
        if version is None or version == self.weight_version:
            return
        for request in [*self.waiting, *self.running]:
            if request.output:
                request.versions.append((self.weight_version, len(request.output)))
        self.weight_version = version

    def flush(self) -> bool:
        """Forget cached prefixes; not while something runs, or waits for other than a pause."""
        if self.running or (self.waiting and not self.engine_paused):
            return False
        self.prefixes.clear()
        return True

    def _loop(self) -> None:
        while True:
            with self.lock:
                while self.engine_paused or not (self.waiting or self.running):
                    self.lock.wait()
                if self.released:
                    die(f"an illegal memory access: {sorted(self.released)} are released")
                try:
                    self._step()
                except Exception as error:
                    die(repr(error))
            time.sleep(max(FAULTS.seconds_per_token, 1e-4))  # let others have the lock

    def _step(self) -> None:
        """One token for each request."""
        decoding = list(self.running)
        for request in self.waiting:
            self._append(request, self._prefill(request))
        self.running += self.waiting
        self.waiting = []
        if decoding:
            last = torch.tensor([[request.output[-1]] for request in decoding])
            caches = [request.cache for request in decoding if request.cache is not None]
            logits, grown = self.model.forward(last, caches)
            for request, row, cache in zip(decoding, logits[:, -1], grown, strict=True):
                request.cache = cache
                self._append(request, row)
        for request in [r for r in self.running if r.finish is not None]:
            self.running.remove(request)
            self._remember(request.prompt + request.output, request.cache)
            request.done.set()
        self.last_output = time.monotonic()

    def _prefill(self, request: Request) -> Tensor:
        """Logits `[vocab]` behind prompt and response so far, with as much as possible from the
        cache.
        """
        ids = request.prompt + request.output
        start = request.logprob_start
        scored = request.return_logprob and start >= 0 and not request.output
        prefix, cache = self._longest(ids[: start + 1] if scored else ids)
        logits, (request.cache,) = self.model.forward(torch.tensor([ids[prefix:]]), [cache])
        request.cached_tokens = prefix
        if prefix < len(ids) - 1:
            self._remember(ids, request.cache)
        if scored:  # at temperature 1, whatever the request's; the first has nothing before it
            logprobs = torch.log_softmax(logits[0], dim=-1)
            of_prompt = [
                float(logprobs[i - 1 - prefix][ids[i]]) for i in range(start + 1, len(ids))
            ]
            request.prompt_logprobs = [None, *of_prompt]
        return logits[0, -1]

    def _append(self, request: Request, logits: Tensor) -> None:
        """Draw the next token from `logits [vocab]`, unless none is wanted, and see if it ends."""
        params, stops = request.params, self.eos | set(request.params.stop_token_ids)
        if request.limit == 0:
            request.finish = {"type": "length", "length": 0}
            return
        if len(request.output) < params.min_new_tokens and stops:
            logits = logits.index_fill(0, torch.tensor(sorted(stops)), float("-inf"))
        logprobs = params.logprobs(logits)
        token = params.draw(logprobs, self._generator_for(request))
        request.output.append(token)
        request.logprobs.append(float(logprobs[token]))
        FAULTS.deadly("die_after_tokens")
        if request.aborted:
            extra = {"message": "Aborted", "status_code": None, "err_type": None}
            request.finish = {"type": "abort", **extra}
        elif token in stops and not params.ignore_eos:
            request.finish = {"type": "stop", "matched": token}
        elif len(request.output) >= request.limit:
            request.finish = {"type": "length", "length": request.limit}

    def _generator_for(self, request: Request) -> torch.Generator:
        """Noise that depends on seed and position alone, or on nothing that a client can choose."""
        if not self.deterministic:
            return self.generator
        seed = 42 if request.params.sampling_seed is None else request.params.sampling_seed
        position = len(request.prompt) + len(request.output)
        return torch.Generator().manual_seed(hash((seed, position)))

    def _longest(self, ids: list[int]) -> tuple[int, Tensor]:
        """The longest cached prefix of `ids`, but for the last token, and its keys and values."""
        best, found = 0, self.model.empty_cache()
        for sequence, cache in self.prefixes:
            pairs = zip(ids[:-1], sequence, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same > best:
                best, found = same, cache[:same]
        return best, found

    def _remember(self, ids: list[int], cache: Tensor | None) -> None:
        assert cache is not None
        sequence = ids[: len(cache)]  # the last token drawn has not been through the model
        self.prefixes = [*self.prefixes[1 - CACHED_SEQUENCES :], (sequence, cache)]
