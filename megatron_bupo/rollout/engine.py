"""What the loop asks of a rollout engine, whoever implements it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.types import Prompt, RolloutGroup, Sampling, SyncReport, Weights


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do beyond its duty."""

    name: str  # with its version, e.g. `sglang 0.5.23`
    ahead: bool  # generates while the caller does something else
    entropies: bool  # tells the entropy that each token was drawn with
    internal_policies: bool  # samples from internal layer policies
    reproducible: bool  # equal seeds draw equal responses


@dataclass(frozen=True)
class ServerHealth:
    """How one server is."""

    address: str
    state: str  # ready | behind (misses an update) | starting | lost
    policy_version: int | None  # of its weights, as last confirmed
    restarts: int = 0


class Pending(Protocol):
    """Responses that are being generated."""

    def collect(self) -> list[RolloutGroup]:
        """Wait for them: a group per prompt, in order, the same on every rank. Collective."""
        ...


class RolloutEngine(Protocol):
    """Prompts in, responses of the full policy out. Every rank calls every method with equal
    arguments.
    """

    def wait_until_up(self, say: Callable[[str], None]) -> None:
        """Return when it can be asked; `say` hears of servers from now on. Collective."""
        ...

    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """A group per prompt, in order, the same on every rank."""
        ...

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> Pending:
        """Start to generate; an engine that cannot do it aside does it when asked to `collect`."""
        ...

    def load_weights(self, weights: Weights, *, version: int) -> SyncReport:
        """Take over full tensors by HF name; what is not among them stays as it is.

        Responses under way go on with the new weights, unless `sync.pause` says otherwise.
        """
        ...

    def pause(self) -> AbstractContextManager[None]:
        """Nothing is sampled inside the block; responses under way go on after it."""
        ...

    def sample_from(self, policy: Policy) -> None:
        """Sample from `policy` from now on. Training never asks for another than the full one."""
        ...

    def health(self) -> list[ServerHealth]:
        """One for each server; an engine without servers is one itself."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...
