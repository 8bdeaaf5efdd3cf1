"""Responses of a model, and what all its layers say at each of their tokens.

::

    OUT/responses.jsonl    what was sampled, as `generate` writes it
    OUT/readings, tokens   what has been read so far (analysis/parts.py)
    OUT/analysis.json      what came of it (analysis/results.py), OUT/layers.parquet
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_bupo import __version__, collective
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.algorithm.entropy_flow import Readings
from megatron_bupo.analysis.moments import Moments, pooled
from megatron_bupo.analysis.parts import add_part, add_tokens, read_parts
from megatron_bupo.analysis.present import present
from megatron_bupo.analysis.results import READ_OUTS, RESULTS, TABLE, results, table, write_results
from megatron_bupo.analysis.stages import advise, as_record
from megatron_bupo.commands.analyze import SAMPLED, Analysis, response_lengths
from megatron_bupo.commands.score import GivenResponse
from megatron_bupo.config import expand
from megatron_bupo.data.packing import in_rounds
from megatron_bupo.durable import add_lines, drop_torn_line, whole_lines
from megatron_bupo.engines import rollout_engine
from megatron_bupo.errors import InputError
from megatron_bupo.generate import Answers, lines_of, not_graded
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.logit_lens import keep_lens
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.logit_lens import LensReader
from megatron_bupo.mcore.residual_readings import ResidualReader
from megatron_bupo.mcore.row_reader import tokens_at_once
from megatron_bupo.record.bar import Bars
from megatron_bupo.record.heartbeat import heartbeat
from megatron_bupo.score import as_batch
from megatron_bupo.types import RolloutGroup, Sampling

PROMPTS_AT_ONCE = 32  # for each rank; what a kill loses at most


def analyze(analysis: Analysis, *, stay: bool = False) -> None:
    """Sample, read and write. Every rank runs this; the first one writes. `stay`: the ranks go on
    to something else, in the same process group.
    """
    ready, out = analysis.ready, analysis.out
    with ExitStack() as stack:
        stack.enter_context(heartbeat(out, ready.layout.world, ready.config.logging.stall_s))
        stack.enter_context(parallel.joined(ready.layout, seed=ready.config.seed, stay=stay))
        live = ready.config.logging.progress
        bars = stack.enter_context(Bars(on=collective.is_first(), live=live))
        responses = analysis.responses or sampled(analysis, bars)
        reader = cache(partial(_reader, analysis))
        parts = read_all(analysis, responses, bars, reader)
        keep_lens(analysis, responses, reader)
        if collective.is_first():
            for line in write(analysis, parts):
                bars.say(line)


def sampled(analysis: Analysis, bars: Bars) -> tuple[GivenResponse, ...]:
    """A response of the full policy to each prompt; those that are on disk are not drawn again."""
    config, prompts, path = analysis.ready.config, analysis.prompts, analysis.out / SAMPLED
    if collective.is_first():
        drop_torn_line(path)
    lines = whole_lines(path) if collective.is_first() else []
    answers = _answers(path, collective.gather(lines))
    if [asked for asked, _ in answers] != [p.input_ids for p in prompts[: len(answers)]]:
        raise InputError(str(path), "has other prompts", "restore it, or choose another --out")
    if len(answers) < len(prompts):
        bars.begin("sampling", len(prompts), "responses", done=len(answers))
        for groups in _draw(analysis, len(answers), bars):
            if collective.is_first():
                answered = Answers(FULL, groups, not_graded(groups))
                add_lines(path, lines_of(answered))
            answers += [(g.prompt.input_ids, g.rollouts[0].response_ids) for g in groups]
            bars.at(len(answers))
    if not any(response for _, response in answers):
        reason = f"the model answered nothing to {len(prompts)} prompts"
        raise InputError(f"model.path={config.model.path}", reason, "give other prompts")
    return tuple(GivenResponse(p + r, len(p)) for p, r in answers if r)


def _answers(path: Path, lines: Sequence[bytes]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The token ids of prompts and responses that stand in `path`."""
    try:
        rows = [json.loads(line) for line in lines]
        return [(tuple(row["input_ids"]), tuple(row["response_ids"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"is not what was sampled ({type(error).__name__}: {error})"
        raise InputError(str(path), reason, "restore it, or choose another --out") from None


def _draw(analysis: Analysis, first: int, bars: Bars) -> Iterator[list[RolloutGroup]]:
    """Responses to the prompts from number `first` on, some at a time."""
    ready, config = analysis.ready, analysis.ready.config
    sampling = Sampling(
        responses_per_prompt=1,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=1.0,
        seed=config.seed,
    )
    assert analysis.tokenizer is not None, "there are prompts"
    engine = rollout_engine(config, ready.architecture, analysis.tokenizer, run_dir=analysis.out)
    try:
        engine.wait_until_up(bars.say)
        engine.sample_from(FULL)
        at_once = PROMPTS_AT_ONCE * ready.layout.world
        for start in range(first, len(analysis.prompts), at_once):
            yield engine.generate(analysis.prompts[start : start + at_once], sampling)
    finally:
        engine.close()


def read_all(
    analysis: Analysis,
    responses: Sequence[GivenResponse],
    bars: Bars,
    reader: Callable[[], ResidualReader],
) -> list[Moments]:
    """What was read of all `responses`, in parts; on the first rank alone."""
    lengths = response_lengths(responses)
    parts = read_parts(analysis.out, lengths) if collective.is_first() else []
    [done] = collective.gather([sum(len(part.tokens) for part in parts)] * collective.is_first())
    bars.begin("reading", sum(lengths), "response tokens", done=sum(lengths[:done]))
    if done == len(responses):
        return parts
    at_once = tokens_at_once(analysis.ready.config)
    for some in in_rounds([len(r.input_ids) for r in responses], at_once, first=done):
        readings = reader().read(as_batch(responses[some]))
        _check_finite(analysis, readings)
        if collective.is_first():
            parts.append(_keep(analysis, some.start, responses[some], readings))
        bars.at(sum(lengths[: some.stop]))
    return parts


def _reader(analysis: Analysis) -> LensReader:
    config = analysis.ready.config
    with ExitStack() as files:
        open_slice = slice_opener(read_index(expand(config.model.path)), files)
        return LensReader(analysis.architecture, config, open_slice, normed=analysis.normed)


def _check_finite(analysis: Analysis, readings: Readings) -> None:
    if not bool(readings.full_entropy.isfinite().all() and readings.layer.entropy.isfinite().all()):
        model = analysis.ready.config.model
        reason, way_out = f"its logits are not finite in {model.dtype}", "check the weights"
        if model.dtype != "float32":
            way_out += ", or set model.dtype=float32"
        raise InputError(f"model.path={model.path}", reason, way_out)


def _keep(
    analysis: Analysis, first: int, responses: Sequence[GivenResponse], readings: Readings
) -> Moments:
    """What there is to remember of `readings`, once it is on disk."""
    of_layers = {name: values.numpy() for name, values in readings.of_layers().items()}
    of_model = {name: values.numpy() for name, values in readings.of_model().items()}
    if analysis.per_token:
        ids = [response.input_ids[response.prompt_length :] for response in responses]
        add_tokens(analysis.out, first, ids, of_layers, of_model)
    moments = Moments.of(of_layers | of_model, response_lengths(responses))
    add_part(analysis.out, first, moments)
    return moments


def write(analysis: Analysis, parts: Sequence[Moments]) -> Iterator[str]:
    """Write the results; what to tell of them, in lines."""
    config, moments = analysis.ready.config, Moments.joined(parts)
    confidence = config.evaluation.confidence
    arch = analysis.architecture
    about = {
        "model": Path(expand(config.model.path)).resolve().name,
        "data": {
            "responses": len(moments.tokens),
            "tokens": int(moments.tokens.sum()),
            "source": analysis.source,
            "sampled": analysis.responses is None,
        },
        "architecture": {
            "model_type": arch.family,
            "layers": arch.layers,
            "hidden_size": arch.hidden_size,
            "vocab_size": arch.vocab_size,
            "tied_embeddings": arch.tied,
        },
        "settings": analysis.settings,
        "versions": {
            "megatron-bupo": __version__,
            "megatron-core": version("megatron-core"),
            "torch": torch.__version__,
        },
    }
    read_out = "norm" if analysis.normed else "raw"
    columns = pooled(moments, confidence=confidence)
    about |= as_record(*advise(moments, confidence=confidence))
    content = results(columns, read_out=read_out, confidence=confidence, about=about)
    write_results(analysis.out, content)
    yield from table(content)
    full = content["full_policy"]
    yield (
        f"{about['data']['tokens']} tokens of {about['data']['responses']} responses, read out "
        f"{READ_OUTS[read_out]}; full policy: entropy {full['entropy_nats']:.3f} nats"
    )
    if (recommended := content["recommendation"]) is not None:
        yield f"bupo.target_layer={recommended['target_layer']}: {recommended['reason']}"
    page, *figures = present(analysis.out)
    yield f"in {analysis.out}: {page.name}, {figures[0].parent.name}, {RESULTS}, {TABLE}"
