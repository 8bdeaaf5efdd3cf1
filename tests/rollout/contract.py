"""An engine under test beside the weights that its trainer has, and what its responses must be."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from megatron_bupo.bed import chain_sums
from megatron_bupo.config import load_config
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.engines import rollout_engine
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.rollout.weights import WholeWeights
from megatron_bupo.types import Prompt, Rollout, RolloutGroup, Sampling, SyncReport
from tests.dense import dense_model
from tests.moments import until
from tests.rollout.fake import Fake

END = chain_sums.TOKEN_IDS["$"]
LETTERS = {i: letter for letter, i in chain_sums.TOKEN_IDS.items()}
PROMPTS = [
    Prompt(index, tuple(chain_sums.encode(text)), "", text)
    for index, text in enumerate(["1+2=", "7", "9+9+9+9+9=", "3+4=", "8+8+8=>1"])
]
SAMPLING = Sampling(responses_per_prompt=3, max_response_tokens=24, temperature=1.0, seed=11)
LONG = replace(SAMPLING, max_response_tokens=200, responses_per_prompt=8)
SLOWLY_S = 0.05  # a token: a long response takes ten seconds, for a test to do something in
FAST = [  # a test does not wait as long as a run for what will not come
    "servers.start_timeout_s=120",
    "servers.request_timeout_s=60",
    "servers.batch_timeout_s=120",
    "servers.attempts=3",
    "servers.health_every_s=1",
    "sync.timeout_s=60",
]


def make_model(directory: Path, tiny_model: Path) -> Path:
    """`tiny_model` with the tokenizer of chain sums, whose 16 tokens are its vocabulary."""
    shutil.copytree(tiny_model, directory)
    chain_sums.save_tokenizer(directory)
    return directory


@dataclass
class Bench:
    """An engine, and all weights that it was ever given."""

    model: Path
    engine: Any
    fakes: Sequence[Fake] = ()
    versions: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # what the engine told

    def __post_init__(self) -> None:
        self.dense = dense_model(self.model, torch.float64)
        weights = self.dense.state_dict().items()
        self.versions.setdefault(0, {name: tensor.float() for name, tensor in weights})

    @property
    def version(self) -> int:
        """The newest."""
        return max(self.versions)

    def learn(self, only: str = "") -> SyncReport:
        """Change all weights whose names begin with `only`, and tell the engine."""
        version = self.version + 1
        noise = torch.Generator().manual_seed(version)
        changed = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=noise)
            for name, tensor in self.versions[version - 1].items()
            if name.startswith(only)
        }
        assert changed
        self.versions[version] = self.versions[version - 1] | changed
        return self.engine.load_weights(WholeWeights(changed), version=version)

    def until_running(self, soon_s: float = 0.4) -> None:
        """Return when all fakes have responses under way; on other servers, after `soon_s`."""
        for fake in self.fakes:
            until(lambda fake=fake: fake.ask("/v1/loads")[1]["loads"][0]["num_running_reqs"])
        time.sleep(0.2 if self.fakes else soon_s)

    def hurry(self) -> None:
        """Have what is under way on the fakes that live come to its end."""
        for fake in self.fakes:
            if fake.process and fake.process.is_alive():
                fake.have(seconds_per_token=0)

    def logprobs(self, rollout: Rollout, sampling: Sampling, version: int) -> Tensor:
        """Of the response tokens `[tokens]` under the weights of `version`, by transformers."""
        prompt, response = rollout.prompt.input_ids, rollout.response_ids
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            exact = {name: tensor.double() for name, tensor in self.versions[version].items()}
            logits = functional_call(self.dense, exact, (ids,)).logits[0]
        of_all = (logits[len(prompt) - 1 : -1] / sampling.temperature).log_softmax(-1)
        return of_all.gather(-1, torch.tensor(response)[:, None])[:, 0].float()

    def check(self, groups: Sequence[RolloutGroup], sampling: Sampling, *, oldest: int) -> None:
        """All of `groups` is what was asked of `PROMPTS`: in order, nothing missing, nothing
        staler than `oldest`, ended for the reason given, and as likely as its weights make it.
        """
        assert [group.prompt for group in groups] == PROMPTS
        assert all(len(group.rollouts) == sampling.responses_per_prompt for group in groups)
        for group in groups:
            for rollout in group.rollouts:
                assert rollout.prompt == group.prompt
                self.check_rollout(rollout, sampling, oldest=oldest)

    def check_rollout(self, rollout: Rollout, sampling: Sampling, *, oldest: int) -> None:
        """One response, as in `check`."""
        ids = rollout.response_ids
        if rollout.finish_reason == "stop":
            assert ids[-1] == END
        if rollout.finish_reason == "length":
            assert len(ids) == sampling.max_response_tokens
        assert END not in ids[:-1]
        assert len(rollout.rollout_logprobs) == len(ids) <= sampling.max_response_tokens
        assert rollout.text == "".join(LETTERS[i] for i in ids if i < END)
        spans = rollout.versions
        ends = [span.end for span in spans]
        assert [span.start for span in spans] == [0, *ends[:-1]][: len(ends)]
        assert (ends[-1] if ends else 0) == len(ids)
        assert all(span.version >= oldest for span in spans)
        assert rollout.policy_version == (spans[0].version if spans else rollout.policy_version)
        for version, start, end in spans:
            expected = self.logprobs(rollout, sampling, version)[start:end]
            error = (torch.tensor(rollout.rollout_logprobs[start:end]) - expected).abs()
            assert error.max() < 1e-5, f"tokens {start} to {end} of {rollout}, {expected}"


@contextlib.contextmanager
def bench_of(
    model: Path, run_dir: Path, settings: Sequence[str], fakes: Sequence[Fake] = ()
) -> Iterator[Bench]:
    """The engine that `settings` describe, as a run makes it, with the weights of `model`."""
    needed = [f"model.path={model}", "data.train=none.jsonl", f"run_dir={run_dir}"]
    config = load_config(None, [*needed, *FAST, *settings])
    bench = Bench(model, None, fakes)
    current: Callable[[], WholeWeights] = lambda: WholeWeights(bench.versions[bench.version])  # noqa: E731
    bench.engine = rollout_engine(
        config,
        read_architecture(model),
        load_tokenizer(str(model)),
        run_dir=run_dir,
        current_weights=current,
    )
    try:
        bench.engine.wait_until_up(bench.news.append)
        yield bench
    finally:
        bench.engine.close()


def on(*fakes: Fake) -> list[str]:
    """Settings of an engine on servers that run already."""
    return ["rollout.engine=sglang", f"servers.addresses=[{','.join(f.url for f in fakes)}]"]
