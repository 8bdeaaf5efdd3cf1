"""Do these answers belong to this evaluation? `OUT/state.json` says what they were drawn with.

::

    {"settings": {"model weights": "sha256:...", "evaluation.temperature": 1.0, ...},
     "benchmarks": {"AIME24": {"questions": "sha256:...",
                               "responses_per_prompt": 32,
                               "seconds": 81.2}}}       of generating and grading, so far

`settings` are what a response or its grade depends on: whoever goes on in the same directory with
another value is refused, by name. Files count by their contents, not by where they lie. What only
reads the answers (k of Pass@k, the intervals) or how fast they come may change; so may the list of
benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bupo.config import Config, expand, flatten
from megatron_bupo.config.evaluation_rules import max_response_tokens
from megatron_bupo.durable import replace_text
from megatron_bupo.errors import InputError
from megatron_bupo.evaluation.asking import Benchmark
from megatron_bupo.evaluation.sheets import sheet_file
from megatron_bupo.hf.tensors import read_index

FILE = "state.json"
MODEL = "config.json generation_config.json"  # what ends a response stands in the second
TOKENIZER = "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja"
SAME = """seed model.dtype rollout.engine evaluation.temperature evaluation.top_p
    sglang.dtype sglang.quantization sglang.kv_cache_dtype"""
HOW_FAST = ("reward.processes",)
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """What the answers in a directory were drawn with, and how long that took."""

    settings: Settings
    benchmarks: Mapping[str, Settings]
    seconds: Mapping[str, float]

    def after(self, benchmark: Benchmark, seconds: float) -> State:
        """The state when `benchmark` has taken `seconds` more."""
        before = self.seconds.get(benchmark.name, 0.0)
        return replace(self, seconds={**self.seconds, benchmark.name: before + seconds})


def state_of(config: Config, benchmarks: Sequence[Benchmark]) -> State:
    """What the answers to `benchmarks` depend on. Reads all of the model's files."""
    model = Path(expand(config.model.path))
    tokenizer = Path(expand(config.model.tokenizer or config.model.path))
    graders = [config.reward.function, *(term.function for term in config.reward.terms)]
    flat = flatten(config)
    settings = {
        "model weights": digest({tensor.file for tensor in read_index(model).tensors.values()}),
        "model config files": digest(model / name for name in MODEL.split()),
        "tokenizer files": digest(tokenizer / name for name in TOKENIZER.split()),
        "reward files": digest(Path(name.rpartition(":")[0]) for name in graders),
        **{key: flat[key] for key in SAME.split() if key in flat},
        "evaluation.max_response_tokens": max_response_tokens(config),
        **{k: v for k, v in flat.items() if k.startswith("reward.") and k not in HOW_FAST},
    }
    return State(settings, {b.name: _asked(b) for b in benchmarks}, {})


def _asked(benchmark: Benchmark) -> Settings:
    rows = hashlib.sha256()
    for prompt in benchmark.prompts:
        asked = [prompt.index, prompt.input_ids, prompt.answer, prompt.row]
        rows.update(json.dumps(asked, default=str).encode() + b"\n")
    count = benchmark.sampling.responses_per_prompt
    return {"questions": f"sha256:{rows.hexdigest()}", "responses_per_prompt": count}


def digest(files: Iterable[Path]) -> str:
    """One of the names and contents of those `files` that there are."""
    there = sorted((file for file in files if file.is_file()), key=lambda file: file.name)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        contents = [*zip((file.name for file in there), pool.map(_sha256, there), strict=True)]
    return f"sha256:{hashlib.sha256(json.dumps(contents).encode()).hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_up(out: Path, now: State) -> State:
    """Make `out` the directory of the evaluation `now`, or check that it is. What other benchmarks
    were asked with stays.
    """
    before = read_state(out)
    names = {*now.benchmarks, *(before.benchmarks if before else ())}
    answered = {name: file for name in names if _has_lines(file := sheet_file(out, name))}
    if before is None and answered:
        reason = f"is there without the {FILE} that says what drew it"
        raise InputError(str(next(iter(answered.values()))), reason, "choose another --out")
    if before is None or not answered:
        before = State(now.settings, {}, {})
    refuse_changes("its answers were drawn with", before.settings, now.settings, out)
    for name in [name for name in now.benchmarks if name in answered]:
        was = before.benchmarks.get(name, {})
        refuse_changes(f"{name} was asked with", was, now.benchmarks[name], out)
    taken_up = replace(before, benchmarks={**before.benchmarks, **now.benchmarks})
    write_state(out, taken_up)
    return taken_up


def _has_lines(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def refuse_changes(what: str, before: Settings, now: Settings, out: Path) -> None:
    """Raise an InputError that names what is not in `out` as it is `now`."""
    for change in _changes(before, json.loads(json.dumps(now))):  # as it is read back
        way_out = "set it as it was, or choose another --out"
        raise InputError(f"--out {out}", f"{what} {change}", way_out)


def _changes(before: Settings, now: Settings) -> Iterator[str]:
    for key in {**before, **now}:
        was, is_now = (json.dumps(s[key]) if key in s else "not set" for s in (before, now))
        if was != is_now:
            digest = was.startswith('"sha256:')
            yield f"other {key}" if digest else f"{key}={was}, which is now {is_now}"


def read_state(out: Path) -> State | None:
    """What stands in `out`; None: nothing."""
    path = out / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = {name: dict(asked) for name, asked in found["benchmarks"].items()}
        seconds = {name: float(asked.pop("seconds")) for name, asked in benchmarks.items()}
        return State(dict(found["settings"]), benchmarks, seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(path), f"cannot be read ({error})", "choose another --out") from None


def write_state(out: Path, state: State) -> None:
    """Put it there so that at any moment the old one or the new one stands there."""
    benchmarks = {
        name: {**asked, "seconds": round(state.seconds.get(name, 0.0), 3)}
        for name, asked in state.benchmarks.items()
    }
    content = {"settings": state.settings, "benchmarks": benchmarks}
    replace_text(out / FILE, json.dumps(content, indent=1) + "\n")
