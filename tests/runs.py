"""The command `megatron-bupo`, run by a test as a user runs it, and a small model to run it on.

A command is a process of its own in a session of its own, but forked from this one, which has
imported everything: that saves its first six seconds. Its output comes through pipes, and to have
ended is to have closed them and to have left no process behind.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from torch._dynamo.trace_rules import get_torch_obj_rule_map

from megatron_bupo.config import load_config
from tests.moments import LIMIT_S

ROOT = Path(__file__).parents[1]
HEAVY = (
    "megatron_bupo.auto_layer",
    "megatron_bupo.commands.train",
    "megatron_bupo.rollout.embedded",
    "megatron_bupo.score",
    "megatron_bupo.train",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "omegaconf._impl",
    "torch.utils.serialization",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.qwen3.modeling_qwen3",
)
MARK = "MEGATRON_BUPO_TEST_RUN"  # in the environment of all that a command starts by exec

# What a model without any skill gets now and then and cannot soon get always: groups keep a signal.
REWARD = """
def reward(response, answer):
    return float(sum(int(c) for c in response + answer if c.isdigit()) % 3 == 0)
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A command that has been started, with the mark that its processes bear."""

    pid: int
    pipes: tuple[int, int]
    mark: str
    _read: dict[int, bytes] = field(default_factory=dict)

    def wait(self, timeout_s: float = LIMIT_S) -> Done:
        """Its end, which is also the end of all its processes; kills what is left at the limit."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for pipe in self.pipes:
                selector.register(pipe, selectors.EVENT_READ)
                self._read[pipe] = b""
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    left = self.processes()
                    self.end()
                    raise TimeoutError(f"still running: {left}\n{self._text()}")
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    self._read[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                        os.close(key.fd)
        _, status = os.waitpid(self.pid, 0)
        while left := self.processes():  # the killed need a moment to die
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError(f"left behind: {left}")
            time.sleep(0.01)
        out, err = (self._read[pipe].decode() for pipe in self.pipes)
        return Done(os.waitstatus_to_exitcode(status), out, err)

    def processes(self) -> list[psutil.Process]:
        """All that is alive of it: its session, and what was started in others."""
        return [p for p in psutil.process_iter() if _is_alive(p) and self._owns(p)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that it forked, in order."""
        return sorted(psutil.Process(self.pid).children(), key=lambda p: p.pid)

    def graders(self) -> list[psutil.Process]:
        """The processes that grade its responses."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has just gone
                if "rewards.worker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def is_alive(self) -> bool:
        """Has it not yet ended?"""
        return _is_alive(psutil.Process(self.pid))

    def kill(self) -> Done:
        """SIGKILL, as the kernel does when memory is out; then its end."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def end(self) -> None:
        """End all of it, whatever state it is in."""
        for process in self.processes():
            process.kill()

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if os.getsid(process.pid) == self.pid:
                return True
            return process.environ().get(MARK) == self.mark
        except (psutil.Error, ProcessLookupError):
            return False

    def _text(self) -> str:
        return b"\n".join(self._read.values()).decode(errors="replace")


def start(
    *argv: object,
    env: Mapping[str, str] | None = None,
    first: Callable[[], object] = lambda: None,
) -> Running:
    """`megatron-bupo ARGV`, going; `first` (see tests/moments.py) is called in its process."""

    def command() -> int:
        first()
        return _main([str(word) for word in argv])

    return fork(command, env=env)


def run(*argv: object, env: Mapping[str, str] | None = None, timeout_s: float = LIMIT_S) -> Done:
    """`megatron-bupo ARGV`, to its end."""
    return start(*argv, env=env).wait(timeout_s)


def run_as_ranks(world: int, *argv: object, timeout_s: float = LIMIT_S) -> list[Done]:
    """`megatron-bupo ARGV` as each of `world` processes that torchrun has started finds itself."""
    told = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _unused_port()}
    ranks = []
    try:
        for rank in range(world):
            env = told | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            ranks.append(start(*argv, env={name: str(value) for name, value in env.items()}))
        return [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()


def start_python(*argv: object) -> Running:
    """`python ARGV`, going: a true command line, imports and all."""
    command = [sys.executable, *map(str, argv)]

    def become() -> int:
        os.chdir(ROOT)
        os.execv(command[0], command)

    return fork(become)


def run_python(*argv: object, timeout_s: float = LIMIT_S) -> Done:
    """`python ARGV`, to its end."""
    return start_python(*argv).wait(timeout_s)


def fork(function: Callable[[], int], *, env: Mapping[str, str] | None = None) -> Running:
    """`function` in a process and session of its own; what it returns is the exit code."""
    _import_heavy()
    mark = uuid.uuid4().hex
    pipes = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(function, [write for _, write in pipes], {**(env or {}), MARK: mark})
    for _, write in pipes:
        os.close(write)
    return Running(pid, (pipes[0][0], pipes[1][0]), mark)


def _unused_port() -> int:
    """Below those that the kernel gives to connections, so none of them takes it meanwhile."""
    for port in range(10_000 + os.getpid() % 10_000, 30_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@cache
def _import_heavy() -> None:
    """Before the fork, so that it costs once; no garbage, so the collector leaves it alone."""
    gc.disable()
    for module in HEAVY:
        importlib.import_module(module)
    Image.preinit()
    load_config(None, ["model.path=any"])  # the schema's types and defaults, and
    get_torch_obj_rule_map()  # what torch.compile's wrappers look up, are read once too
    gc.freeze()
    gc.enable()


def _become(function: Callable[[], int], outputs: Sequence[int], env: Mapping[str, str]) -> None:
    """Never returns: pytest must not go on twice."""
    gc.freeze()  # else its collector walks through, and so copies, all that the parent holds
    code = 70
    try:
        os.setsid()
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, output in enumerate(outputs, start=1):
            os.dup2(output, descriptor)
            os.close(output)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = function()
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(argv: list[str]) -> int:
    from megatron_bupo.cli import main

    sys.argv = ["megatron-bupo", *argv]
    return main(argv)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Bed:
    """A model, data and a reward function, small enough to train on in a second."""

    folder: Path

    def settings(self, run_dir: Path, *more: str) -> list[str]:
        """A run of six steps, three of them of internal layer 5 of 6, over two pipeline stages."""
        return [
            f"run_dir={run_dir}",
            f"model.path={self.folder / 'model'}",
            f"data.train={self.folder / 'train.jsonl'}",
            f"data.eval={self.folder / 'eval.jsonl'}",
            "data.max_prompt_tokens=16",
            f"reward.function={self.folder / 'reward.py'}:reward",
            "steps=6",
            "bupo.target_layer=5",
            "bupo.internal_steps=3",
            "parallel.pp=2",
            "checkpoint.every=1",
            "rollout.prompts_per_step=4",
            "rollout.responses_per_prompt=4",
            "rollout.max_response_tokens=10",
            "algorithm.minibatches=2",
            "trainer.microbatch_size=4",
            "optimizer.lr=5e-4",
            "evaluation.every=3",
            "logging.tensorboard=false",
            *more,
        ]

    def train(self, run_dir: Path, *more: str) -> list[dict[str, Any]]:
        """Train to the end; the metrics."""
        done = run("train", *self.settings(run_dir, *more))
        assert done.code == 0, done.err
        return metrics(run_dir)


def make_bed(folder: Path) -> Bed:
    """A base model that has hardly learnt anything: made in a second, and its responses vary."""
    _import_heavy()  # before a test has changed where modules are found
    from megatron_bupo.bed import base_model, chain_sums

    base_model.save_base_model(folder / "model", steps=10)
    (folder / "train.jsonl").write_text(chain_sums.jsonl(chain_sums.TRAIN[:48]))
    (folder / "eval.jsonl").write_text(chain_sums.jsonl(chain_sums.EVAL[:4]))
    (folder / "reward.py").write_text(REWARD)
    return Bed(folder)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the times that they took."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs can be expected to agree on."""
    return {k: v for k, v in record.items() if not k.startswith(("time/", "perf/", "memory/"))}
