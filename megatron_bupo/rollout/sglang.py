"""Rollouts from SGLang servers, over HTTP alone.

Every rank has this engine and calls it alike. The first one runs the fleet of servers and asks them
for responses, on a loop beside its main thread; all of them send weights. What the first one comes
to, all come to (`collective.from_first`), errors too.

A server that lost its weights, or never had them, gets them as soon as the ranks are here together:
while they wait for responses, or with the next update.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_bupo import collective, stopping
from megatron_bupo.config import expand
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.rollout.background import BackgroundLoop
from megatron_bupo.rollout.dispatch import Batch
from megatron_bupo.rollout.draft import Draft
from megatron_bupo.rollout.engine import Capabilities, ServerHealth
from megatron_bupo.rollout.fleet import Fleet
from megatron_bupo.rollout.reading import check_prompt, text_of
from megatron_bupo.rollout.server import Server, State
from megatron_bupo.rollout.sync.broadcast import BroadcastTransport
from megatron_bupo.rollout.sync.disk import DiskTransport
from megatron_bupo.rollout.sync.http import HttpTransport
from megatron_bupo.rollout.sync.ipc import IpcTransport
from megatron_bupo.rollout.update import Plan, close_update, open_catch_up, open_update
from megatron_bupo.types import RolloutGroup, SyncReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_bupo.algorithm.bupo import Policy
    from megatron_bupo.config.schema import Config
    from megatron_bupo.hf.architecture import DecoderSizes
    from megatron_bupo.types import Prompt, Sampling, Weights

TRANSPORTS = {
    "broadcast": BroadcastTransport,
    "http": HttpTransport,
    "disk": DiskTransport,
    "ipc": IpcTransport,
}


@dataclass(frozen=True)
class Model:
    """What is served: sizes, and the tokenizer that reads it."""

    sizes: DecoderSizes
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]


class SGLangEngine:
    """A `RolloutEngine` on the servers of `config.servers`; starts them at once, aside."""

    def __init__(
        self,
        config: Config,
        model: Model,
        *,
        run_dir: Path,
        current_weights: Callable[[], Weights],
    ) -> None:
        """`current_weights()` are all that the trainer has: what a server that lost its own
        needs.
        """
        self.config, self.model, self.current_weights = config, model, current_weights
        self.directory = Path(expand(config.sync.directory or str(run_dir / "weights")))
        index = read_index(expand(config.model.path))
        self.transport = TRANSPORTS[config.sync.mode](
            config.sync,
            shapes={name: tensor.shape for name, tensor in index.tensors.items()},
            api_key=config.servers.api_key,
            directory=self.directory,
        )
        self.context = model.sizes.max_positions  # the servers', once they are up
        if collective.is_first():
            self.loop = BackgroundLoop("sglang")
            self.fleet = self.loop.run(_made(config, run_dir))
            self._starting = self.loop.start(self.fleet.start())

    def wait_until_up(self, say: Callable[[str], None]) -> None:
        """Return when a server can be asked; `say` hears of them from now on. Collective."""

        async def up() -> tuple[Capabilities, int]:
            self.fleet.say = say
            await asyncio.wrap_future(self._starting)
            facts = [s.facts for s in self.fleet.up if s.facts is not None]
            versions = sorted({f.version for f in facts})
            context = min(f.most_tokens(self.model.sizes.max_positions) for f in facts)
            return Capabilities(
                name=f"sglang {', '.join(versions)}",
                ahead=True,
                entropies=False,
                internal_policies=True,
                reproducible=all(f.deterministic for f in facts),
            ), context

        self._capabilities, self.context = self._from_first(up)
        plan = self._from_first(lambda: open_catch_up(self.fleet))
        if plan.whole:
            self.catch_up(plan)

    def capabilities(self) -> Capabilities:
        """What the servers that came up first can do."""
        return self._capabilities

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """A group per prompt, in order, the same on every rank."""
        return self.begin(prompts, sampling).collect()

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> _Pending:
        """Ask for responses; servers answer while the caller does something else."""
        for prompt in prompts:
            check_prompt(
                prompt,
                context=self.context,
                vocab_size=self.model.sizes.vocab_size,
                max_response_tokens=sampling.max_response_tokens,
            )
        self.wake()
        return _Pending(self, prompts, sampling)

    def load_weights(self, weights: Weights, *, version: int) -> SyncReport:
        """Bring `weights` to all servers, and all weights to those that are behind. Collective."""
        self._free_gpu_memory()
        plan = self._from_first(lambda: open_update(self.fleet, version))
        return self._send(plan, weights)

    def catch_up(self, plan: Plan) -> None:
        """Bring all weights to the servers of `plan`. Collective."""
        self._send(plan, None)

    def _send(self, plan: Plan, changed: Weights | None) -> SyncReport:
        began = time.monotonic()
        parts = []
        kwargs: dict[str, Any] = {"version": plan.version, "digest": plan.digest}
        if plan.changed and changed is not None:
            parts.append(self.transport.send(changed, plan.changed, **kwargs))
        if plan.whole:
            parts.append(self.transport.send(self.current_weights(), plan.whole, **kwargs))
        every = collective.gather([parts])
        sent = [part for of_rank in every for part in of_rank]
        have = self._from_first(lambda: close_update(self.fleet, plan, sent, self.directory))
        first = [of_rank[0].bytes for of_rank in every if of_rank]
        return SyncReport(
            sent_bytes=max(first) if self.config.sync.mode == "ipc" else sum(first),
            seconds=time.monotonic() - began,
            recovered=len(plan.whole),
            behind=max(len(plan.changed) + len(plan.whole) - have, 0),
        )

    def rest(self) -> None:
        """Have servers that share GPUs with the trainer give their memory to it. Collective."""
        if self.config.rollout.colocated:
            self._from_first(lambda: self.fleet.sleep())  # noqa: PLW0108 - one rank has it

    def wake(self) -> None:
        """Have them take it back. Collective."""
        if self.config.rollout.colocated:
            self._free_gpu_memory()
            self._from_first(lambda: self.fleet.wake())  # noqa: PLW0108 - one rank has it

    def _free_gpu_memory(self) -> None:
        if self.config.rollout.colocated and torch.cuda.is_available():
            torch.cuda.empty_cache()
            collective.gather([None])  # all ranks have

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is sampled inside the block; responses under way go on after it. Collective."""
        self._from_first(lambda: self.fleet.pause(self.config.sync.pause))
        try:
            yield
        finally:
            self._from_first(lambda: self.fleet.resume())  # noqa: PLW0108 - one rank has it

    def sample_from(self, policy: Policy) -> None:
        """Sample from `policy` from now on; needs servers with our model package. Collective."""

        async def switch() -> None:
            self.fleet.read_out = policy
            await self.fleet.switch_read_outs(self.model.sizes.layers)

        self._from_first(switch)

    def health(self) -> list[ServerHealth]:
        """One for each server. Collective."""

        async def look() -> list[ServerHealth]:
            return [
                ServerHealth(
                    address=server.address,
                    state=_word(server, self.fleet),
                    policy_version=server.version if server.version >= 0 else None,
                    restarts=server.restarts,
                )
                for server in self.fleet.servers
            ]

        return self._from_first(look)

    def close(self) -> None:
        """Stop the servers that were started here."""
        self.transport.close()
        if collective.is_first():
            self.loop.cancel_all()  # before what it would miss is closed
            self.loop.run(self.fleet.close())
            self.loop.close()

    def _from_first(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return collective.from_first(lambda: self.loop.start(work()))


class _Pending:
    """A batch under way on the first rank."""

    def __init__(self, engine: SGLangEngine, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self._work = engine.loop.start(self._run()) if collective.is_first() else None

    def collect(self) -> list[RolloutGroup]:
        """A group per prompt, in order, the same on every rank. Collective."""
        while True:
            outcome = self.engine._from_first(self._next)
            if isinstance(outcome, Plan):
                self.engine.catch_up(outcome)
            elif outcome is not None:
                self.engine.rest()
                return outcome
            elif stopping.is_allowed():
                stopping.vote()

    async def _next(self) -> list[RolloutGroup] | Plan | None:
        """The responses, or servers to bring up to date first; None: neither within `WAIT_S`."""
        assert self._work is not None
        fleet, work = self.engine.fleet, asyncio.wrap_future(self._work)
        until = time.monotonic() + collective.WAIT_S
        while not work.done():
            await fleet.switch_read_outs(self.engine.model.sizes.layers)
            if fleet.behind:
                return await open_catch_up(fleet)
            await asyncio.wait({work}, timeout=0.02 if not fleet.usable else 0.2)
            if time.monotonic() > until:
                return None
        return work.result()

    async def _run(self) -> list[RolloutGroup]:
        model, fleet = self.engine.model, self.engine.fleet
        drafts = [
            Draft(prompt, response, self.sampling, model.stop_ids, model.sizes.vocab_size)
            for prompt in self.prompts
            for response in range(self.sampling.responses_per_prompt)
        ]
        batch = Batch(fleet, drafts, self.engine.config)
        await batch.run()
        if batch.cut:
            cut = sum(draft.finish_reason == "abort" for draft in drafts)
            fleet.tell(f"{cut} of {len(drafts)} responses were cut: {batch.cut}")
        return await asyncio.to_thread(_groups, self.prompts, drafts, model, batch.version)


def _groups(
    prompts: Sequence[Prompt], drafts: Sequence[Draft], model: Model, version: int
) -> list[RolloutGroup]:
    """Finished drafts as rollouts, by prompt."""
    rollouts = [
        draft.rollout(text_of(draft.ids, model.tokenizer), version=version) for draft in drafts
    ]
    size = len(rollouts) // max(len(prompts), 1)
    return [
        RolloutGroup(prompt, tuple(rollouts[i * size : (i + 1) * size]))
        for i, prompt in enumerate(prompts)
    ]


def _word(server: Server, fleet: Fleet) -> str:
    """The state of `server`, as a user would say it."""
    if server.state is State.UP:
        return "ready" if server in fleet.usable else "behind"
    return server.state.value


async def _made(config: Config, run_dir: Path) -> Fleet:
    """A fleet made inside the loop that it belongs to."""
    return Fleet(config, run_dir)
