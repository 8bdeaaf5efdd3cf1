"""How much of a SGLang server's throughput does our client lose?

    python tools/bench_rollout.py --python .venv-sglang/bin/python --json rollout.json

A small random Qwen3, which leaves a client little time, answers batches of responses that are in
flight all at once: asked by the engine that a run uses, and by a loop that posts the same requests,
serialised before, and does not look into the answers. All responses have full length. The two take
turns, so that whatever else the machine does meets both alike; medians are shown, and what is lost
is the median over pairs of turns. CPU seconds matter where client and server share few cores: what
the one uses the other lacks.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is in modules of their own

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.checks import check
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.engines import rollout_engine
from megatron_bupo.preflight import check_model
from megatron_bupo.rollout.background import BackgroundLoop
from megatron_bupo.rollout.client import IDLE_S
from megatron_bupo.rollout.draft import Draft
from megatron_bupo.types import Prompt, Sampling
from tools import options
from tools.servers import RunningServer, running_server, server_settings
from tools.shapes import Shape

SMALL = Shape(layers=2, hidden=64, ffn=160, response_tokens=64)
SIZES = {name: size for name, size in asdict(SMALL).items() if name != "responses"}
CONCURRENCY = (64, 256, 1024)
TOLERATED = 0.05  # of the raw server's throughput
OURS, RAW = "ours", "raw"
GROUP = 8  # responses to a prompt


@dataclass(frozen=True)
class Turn:
    """What one batch took."""

    seconds: float
    tokens: int  # sampled
    client_cpu_s: float
    server_cpu_s: float

    def row(self) -> dict[str, float]:
        """Speed and costs."""
        thousand = self.tokens / 1000
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "client_cpu_s_per_1000_tokens": self.client_cpu_s / thousand,
            "server_cpu_s_per_1000_tokens": self.server_cpu_s / thousand,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, start a server of it, ask it both ways, tell and write what came out."""
    args = parse(argv)
    shape = replace(SMALL, **{name: getattr(args, name) for name in SIZES})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(shape, folder / "model")
        cache = 2 * max(args.concurrency) * (shape.prompt_tokens + shape.response_tokens)
        settings = [f"model.path={folder}/model", "data.train=none", f"run_dir={folder}"]
        settings += [*server_settings(args.python), f"sglang.max_total_tokens={cache}"]
        config = load_config(None, [*settings, *args.overrides])
        check(config, None, training=False)
        with running_server(config, folder) as server:
            rows = measure(config, shape, server, args.concurrency, args.repeats)
    Console().print(as_table(rows))
    if args.json:
        report = {"rows": rows, "shape": asdict(shape), "tolerated": TOLERATED}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--python", help="interpreter that can import sglang")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    options.add_numbers(parser, {"repeats": 5} | SIZES)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def write_model(shape: Shape, directory: Path) -> None:
    """The random model, with a tokenizer that has a word for each id and none that ends."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # A server does not let a response fill its context to the last token.
    replace(shape, response_tokens=shape.response_tokens + 8).write_model(directory)
    words = {f"word{i}": i for i in range(shape.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def measure(
    config: Config, shape: Shape, server: RunningServer, concurrency: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """A row per number of requests in flight: medians of both ways, and what ours loses."""
    turns: dict[tuple[int, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        ask = {
            OURS: _ours(config, server, stack),
            RAW: _raw(server, stack, vocab=shape.vocab),
        }
        for repeat in range(-1, repeats):  # the first round makes connections
            for count in concurrency:
                for who in [*ask][:: -1 if repeat % 2 else 1]:
                    turn = ask[who](*questions(shape, count, seed=repeat + 1))
                    if turn.tokens != count * shape.response_tokens:
                        raise RuntimeError(f"{who}: {turn.tokens} tokens for {count} requests")
                    if repeat >= 0:
                        turns.setdefault((count, who), []).append(turn.row())
    return [row_of(count, turns[count, OURS], turns[count, RAW]) for count in concurrency]


def questions(shape: Shape, count: int, *, seed: int) -> tuple[list[Prompt], Sampling]:
    """Prompts and sampling for `count` responses of full length."""
    group = GROUP if count % GROUP == 0 else 1
    prompts = [
        Prompt(i, tuple((7 * i + j) % shape.vocab for j in range(shape.prompt_tokens)), "", "")
        for i in range(count // group)
    ]
    return prompts, Sampling(group, shape.response_tokens, temperature=1.0, seed=seed)


Ask = Callable[[list[Prompt], Sampling], Turn]


def _ours(config: Config, server: RunningServer, stack: ExitStack) -> Ask:
    """Ask by the engine that a run uses."""
    model_dir = config.model.path
    config = replace(config, servers=replace(config.servers, addresses=[server.address]))
    engine = rollout_engine(
        config,
        check_model(config, training=False),
        load_tokenizer(model_dir),
        run_dir=Path(config.run_dir),
    )
    stack.callback(engine.close)
    engine.wait_until_up(lambda _: None)

    def ask(prompts: list[Prompt], sampling: Sampling) -> Turn:
        groups, seconds, cpu_s, server_cpu_s = _timed(
            server, lambda: engine.generate(prompts, sampling)
        )
        tokens = sum(len(rollout.response_ids) for g in groups for rollout in g.rollouts)
        return Turn(seconds, tokens, cpu_s, server_cpu_s)

    return ask


def _raw(server: RunningServer, stack: ExitStack, *, vocab: int) -> Ask:
    """Ask by as little as there can be."""
    loop = BackgroundLoop("raw")
    stack.callback(loop.close)
    session = loop.run(_session())
    stack.callback(lambda: loop.run(session.close()))

    async def post(body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{server.address}/generate", data=body, headers=headers) as reply:
            return await reply.read()

    async def post_all(bodies: Sequence[bytes]) -> list[bytes]:
        gc.freeze()  # as ours does
        try:
            return await asyncio.gather(*map(post, bodies))
        finally:
            gc.unfreeze()

    def ask(prompts: list[Prompt], sampling: Sampling) -> Turn:
        bodies = [
            json.dumps(Draft(prompt, response, sampling, (), vocab).request()).encode()
            for prompt in prompts
            for response in range(sampling.responses_per_prompt)
        ]
        replies, seconds, cpu_s, server_cpu_s = _timed(server, lambda: loop.run(post_all(bodies)))
        tokens = sum(len(json.loads(reply)["output_ids"]) for reply in replies)
        return Turn(seconds, tokens, cpu_s, server_cpu_s)

    return ask


async def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S), timeout=timeout
    )


def _timed(server: RunningServer, work: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """What `work` returns, its seconds, and the CPU seconds of this process and the server's."""
    server_cpu_s, cpu_s, start = server.cpu_s(), time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
    return result, seconds, cpu_s, server.cpu_s() - server_cpu_s


def row_of(
    count: int, ours: Sequence[dict[str, float]], raw: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Medians of both, and of what ours lost in each pair of turns."""
    pairs = zip(ours, raw, strict=True)
    lost = median(1 - mine["tokens_per_s"] / theirs["tokens_per_s"] for mine, theirs in pairs)
    medians = {
        who: {name: median(turn[name] for turn in turns) for name in turns[0]}
        for who, turns in ((OURS, ours), (RAW, raw))
    }
    return {"requests": count, "lost": lost} | medians


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours beside raw."""
    table = Table(title=f"what our client loses; {TOLERATED:.0%} are tolerated")
    headings = ("requests\nin flight", "", "tokens/s", "lost")
    headings += ("client CPU s\nper 1000 tokens", "server CPU s\nper 1000 tokens")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        for who in (RAW, OURS):
            costs = row[who]
            table.add_row(
                str(row["requests"]) if who == RAW else "",
                who,
                f"{costs['tokens_per_s']:.0f}",
                f"{row['lost']:.1%}" if who == OURS else "",
                f"{costs['client_cpu_s_per_1000_tokens']:.4f}",
                f"{costs['server_cpu_s_per_1000_tokens']:.4f}",
            )
    return table


if __name__ == "__main__":
    main()
