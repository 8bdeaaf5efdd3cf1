"""A batch of responses over all servers: nothing lost, nothing stale, no straggler waited for.

Each response is a request of its own, to the server with the least to do. A request that fails goes
to another, after a moment; an answer drawn with weights older than the batch may have is thrown
away. When the step's budget of seconds or tokens is spent, what is unfinished is cut.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_bupo.errors import RunStopped
from megatron_bupo.rollout.client import Refused, ServerError
from megatron_bupo.rollout.draft import BadReply, Draft

if TYPE_CHECKING:
    from megatron_bupo.config.schema import Config
    from megatron_bupo.rollout.fleet import Fleet
    from megatron_bupo.rollout.server import Server

ABORT_AGAIN_S = 1.0  # a request may be so new that its server does not know it yet
BUSY = (408, 425, 429)  # answers that say: later


class Batch:
    """The responses of a step, drawn with weights of `version` or newer."""

    def __init__(self, fleet: Fleet, drafts: Sequence[Draft], config: Config) -> None:
        self.fleet, self.drafts, self.config = fleet, drafts, config
        self.version = fleet.version
        self.cut = ""  # why the unfinished were cut
        self._asked: dict[str, Server] = {}  # request id -> who was asked
        self._tokens = 0  # of finished responses

    async def run(self) -> Sequence[Draft]:
        """The drafts, finished or cut.

        Raises:
            RunStopped: a response failed too often, all took too long, or no server is left.
        """
        limit = self.config.servers.batch_timeout_s
        budget = asyncio.create_task(self._spend())
        work = [asyncio.create_task(self._finish(draft)) for draft in self.drafts]
        # Answers are many small lists, for which Python would look at all that a trainer holds.
        gc.freeze()
        try:
            async with asyncio.timeout(limit):
                await asyncio.gather(*work)
        except TimeoutError:
            unfinished = sum(not task.done() for task in work)
            raise RunStopped(
                f"{unfinished} of {len(work)} responses were not finished within "
                f"servers.batch_timeout_s={limit:g}"
            ) from None
        finally:
            gc.unfreeze()
            for task in [budget, *work]:
                task.cancel()
            await asyncio.gather(budget, *work, return_exceptions=True)
        return self.drafts

    async def _finish(self, draft: Draft) -> None:
        """Ask for `draft` until it is finished or cut."""
        failures = 0
        while not self.cut:
            tokens = draft.tokens_ahead
            server = await self.fleet.lease(tokens, needed=lambda: not self.cut)
            if server is None:
                break
            before = len(draft.ids)
            try:
                await self._ask(server, draft)
                if draft.finish_reason != "abort":
                    self._count(len(draft.ids))
                    return
                error: Exception = BadReply("the request was aborted before its first token")
                failures = 0 if len(draft.ids) > before else failures + 1
            except (ServerError, BadReply) as failure:
                error, failures = failure, failures + 1
                self._judge(server, draft, failure)
            finally:
                server.outstanding_tokens -= tokens
            if failures >= self.config.servers.attempts:
                raise RunStopped(
                    f"a response to data row {draft.prompt.index} failed {failures} times in a "
                    f"row, last on {server.name}: {error}"
                )
            if failures:
                await asyncio.sleep(min(0.1 * 2**failures, 10.0))

    async def _ask(self, server: Server, draft: Draft) -> None:
        body = draft.request()
        rid, version = draft.rid, server.version
        draft.attempts += 1
        self._asked[rid] = server
        try:
            timeout_s = self.config.servers.request_timeout_s
            router = self.fleet.router.client if self.fleet.router else None
            reply = await server.generate(body, timeout_s=timeout_s, router=router)
        except ServerError:
            # It may be slow rather than gone, and should not work on for nobody.
            abort = asyncio.create_task(server.abort([rid]))
            server.under_way.add(abort)
            abort.add_done_callback(server.under_way.discard)
            raise
        finally:
            del self._asked[rid]
        assert server.facts is not None
        spans = server.facts.tells_spans
        draft.take(reply, version=version, oldest=self.version, tells_spans=spans)
        draft.server = server.address

    def _judge(self, server: Server, draft: Draft, failure: Exception) -> None:
        """What a failed request says about the server."""
        if isinstance(failure, BadReply):
            if self.fleet.router is None:  # which does not say whom it asked
                self.fleet.lose(server, str(failure))
        elif not isinstance(failure, Refused):
            server.suspected.set()
        elif 400 <= failure.status < 500 and failure.status not in BUSY:
            raise RunStopped(
                f"{server.name} refuses to answer data row {draft.prompt.index}: {failure}"
            )

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        most = self.config.rollout.step_budget_tokens
        if most is not None and self._tokens >= most and not self.cut:
            self._cut_rest(f"rollout.step_budget_tokens={most} are spent")

    async def _spend(self) -> None:
        """Cut when the seconds are spent, and abort until all have returned."""
        seconds = self.config.rollout.step_budget_s
        if seconds is not None:
            await asyncio.sleep(seconds)
            if not self.cut:
                self._cut_rest(f"rollout.step_budget_s={seconds:g} are spent")
        while seconds is not None or self.config.rollout.step_budget_tokens is not None:
            if self.cut:
                await self._abort_asked()
            await asyncio.sleep(ABORT_AGAIN_S if self.cut else 0.05)

    def _cut_rest(self, why: str) -> None:
        self.cut = why
        self.fleet.changed.set()

    async def _abort_asked(self) -> None:
        asked = [*self._asked.items()]
        for server in self.fleet.up:  # behind a router any of them may have it
            rids = [rid for rid, whom in asked if self.fleet.router or whom is server]
            await server.abort(rids)
