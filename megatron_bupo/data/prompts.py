"""From questions to prompts: the text that the model reads, in tokens, and what the answer is."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.questions import Question
from megatron_bupo.data.rows import Row
from megatron_bupo.data.sources import (
    Part,
    Source,
    evaluation_source,
    read_part,
    settle,
    training_parts,
    understood,
)
from megatron_bupo.data.tokenizer import has_chat_template, no_chat_template
from megatron_bupo.errors import InputError
from megatron_bupo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Benchmarks = Sequence[str]  # the data that is evaluated on, as paths


def check_rows(
    data: DataConfig, benchmarks: Benchmarks = (), *, tokenizer: str | None = None
) -> list[str]:
    """Every row of the training data and the benchmarks has a question and an answer, and the
    tokenizer in that directory a chat template if they need one; and what there is to say about
    them, by the rules of `sources.py`. Loads no tokenizer.
    """
    parts, notes = training_parts(data, _evaluation(data, benchmarks))
    chats = any(not isinstance(q.prompt, str) for part in parts for q in part.questions)
    if chats and tokenizer is not None and not has_chat_template(tokenizer):
        raise no_chat_template(tokenizer)
    return notes


def load_training(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, benchmarks: Benchmarks = ()
) -> list[tuple[float, list[Prompt]]]:
    """The prompts of each training source, with its weight.

    `Prompt.index` counts the rows of all sources, one after the other; so it says the same whatever
    is dropped.
    """
    # who only warns has done so before the run began
    evaluation = _evaluation(data, benchmarks) if data.contamination == "drop" else []
    parts, _ = training_parts(data, evaluation)
    first, loaded = 0, []
    for part in parts:
        prompts = encode(part, data, tokenizer, first_index=first)
        loaded.append((part.source.weight, prompts))
        first += part.rows
    return loaded


def load_prompts(
    source: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, answers: bool = True
) -> list[Prompt]:
    """The prompts of `source` in file order, without those longer than `data.max_prompt_tokens`.

    `answers=False`: rows need none, and prompts have "" for it.
    """
    part, bad = read_part(evaluation_source(source, data), data, answers=answers)
    return _settled(part, bad, data, tokenizer)


def as_prompts(
    rows: list[Row],
    source: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers: bool,
) -> list[Prompt]:
    """The prompts of `rows`, which come from `source`; as `load_prompts`."""
    part, bad = understood(rows, evaluation_source(source, data), data, answers=answers)
    return _settled(part, bad, data, tokenizer)


def _settled(
    part: Part, bad: list[InputError], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    for note in settle(bad, part.rows, skip=data.bad_rows == "skip"):
        _warn(note)
    return encode(part, data, tokenizer)


def _evaluation(data: DataConfig, benchmarks: Benchmarks) -> list[Source]:
    named = [("evaluation.benchmarks.data", path) for path in dict.fromkeys(benchmarks)]
    if data.eval is not None:
        named.append(("data.eval", data.eval))
    return [evaluation_source(path, data, key=key) for key, path in named]


def encode(
    part: Part, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, first_index: int = 0
) -> list[Prompt]:
    """The prompts of `part` that are short enough, with their rows counted from `first_index`."""
    _look_at_template(part.questions, data, tokenizer)
    bad: list[InputError] = []
    prompts, lengths = [], []
    for question, text, ids in _encoded(part.questions, data, tokenizer, bad):
        lengths.append(len(ids))
        if len(ids) <= data.max_prompt_tokens:
            row, index = question.row, first_index + question.row.index
            answer, name = question.answer, part.source.name
            prompts.append(Prompt(index, tuple(ids), answer, text, row.values, name))
    for note in settle(bad, len(part.questions), skip=data.bad_rows == "skip"):
        _warn(note)
    limit, path = f"data.max_prompt_tokens={data.max_prompt_tokens}", part.source.path
    if not prompts:
        reason = f"all {len(lengths)} prompts of {path} are longer, the shortest has {min(lengths)}"
        raise InputError(limit, f"{reason} tokens", "raise it")
    if len(prompts) < len(lengths):
        dropped = len(lengths) - len(prompts)
        _warn(f"{limit}: dropped {dropped} of {len(lengths)} prompts of {path}")
    return prompts


def _look_at_template(
    questions: Sequence[Question], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Chat messages have a template, and it reads what it is given."""
    if all(isinstance(question.prompt, str) for question in questions):
        return
    template = tokenizer.chat_template
    if template is None:
        raise no_chat_template(tokenizer.name_or_path)
    for name in data.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(str(name))}\b", str(template)):
            _warn(f"data.chat_template_kwargs.{name}: the tokenizer's chat template has no {name}")


def _encoded(
    questions: Sequence[Question],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    bad: list[InputError],
) -> Iterator[tuple[Question, str, list[int]]]:
    """Each question with its text and tokens; those that have none go to `bad`."""
    rendered: list[tuple[Question, str]] = []
    for question in questions:
        try:
            rendered.append((question, _text(question, data, tokenizer)))
        except InputError as error:
            bad.append(error.with_traceback(None))
    encoded = _tokens(rendered, tokenizer)
    for (question, text), ids in zip(rendered, encoded, strict=True):
        if isinstance(ids, InputError):
            bad.append(ids)
        elif not ids:
            where, reason = question.row.where, "the tokenizer leaves nothing of its prompt"
            bad.append(InputError(where, reason, "mend the row, or see model.tokenizer"))
        else:
            yield question, text, ids


def _text(question: Question, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model reads, before tokenisation."""
    if isinstance(question.prompt, str):
        return question.prompt
    try:
        rendered = tokenizer.apply_chat_template(
            list(question.prompt),  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=True,
            **data.chat_template_kwargs,
        )
    except Exception as error:  # templates raise what they like
        reason = f"the chat template does not take these messages ({error})"
        way_out = "see data.system_prompt and data.chat_template_kwargs"
        raise InputError(question.row.where, reason, way_out) from error
    return str(rendered)


def _tokens(
    rendered: Sequence[tuple[Question, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | InputError]:
    """What `apply_chat_template(tokenize=True)` gives, for all texts at once."""
    if not rendered:
        return []
    try:
        return tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
    except Exception as error:  # a vocabulary without an unknown token meets an unknown character
        if len(rendered) > 1:
            return [_tokens([one], tokenizer)[0] for one in rendered]
        reason = f"the tokenizer cannot encode its prompt ({error})"
        way_out = "mend the row, or see model.tokenizer"
        return [InputError(rendered[0][0].row.where, reason, way_out)]


def _warn(text: str) -> None:
    """Say it once, not on every rank."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(text)
