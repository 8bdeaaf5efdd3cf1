"""From data rows to prompts: what to ask, in tokens, and what the answer is.

A prompt column holds a string or a list of chat messages. Messages go through the tokenizer's chat
template; strings are tokenised as they stand, without special tokens, unless
`data.chat_template=true` makes them one user message. `data.system_prompt` comes first: as the
system message (in place of one that the row brings), or as text in front of a plain string.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.rows import Row, read_rows
from megatron_bupo.errors import InputError
from megatron_bupo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Question = str | list[dict[str, str]]

# What columns are usually called, the likelier first
PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer")


def check_rows(data: DataConfig) -> None:
    """Every row of the train and eval data has a prompt and an answer. Needs no tokenizer."""
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        for row in read_rows(source, key=key) if source else ():
            _question(row, data)
            _answer(row, data)


def load_prompts(
    source: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, answers: bool = True
) -> list[Prompt]:
    """The prompts of `source` in file order, without those longer than `data.max_prompt_tokens`.

    `answers=False`: rows need none, and prompts have "" for it.
    """
    return as_prompts(list(read_rows(source)), source, data, tokenizer, answers=answers)


def as_prompts(
    rows: list[Row],
    source: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers: bool,
) -> list[Prompt]:
    """The prompts of `rows`, which come from `source`; as `load_prompts`."""
    texts = [_text(row, data, tokenizer) for row in rows]
    encoded = _encode(rows, texts, tokenizer)
    prompts = [
        Prompt(row.index, tuple(ids), _answer(row, data) if answers else "", text, row.values)
        for row, text, ids in zip(rows, texts, encoded, strict=True)
        if len(ids) <= data.max_prompt_tokens
    ]
    limit = f"data.max_prompt_tokens={data.max_prompt_tokens}"
    if not prompts:
        shortest = min(len(ids) for ids in encoded)
        reason = (
            f"all {len(rows)} prompts of {source} are longer, the shortest has {shortest} tokens"
        )
        raise InputError(limit, reason, "raise it")
    if len(prompts) < len(rows):
        dropped = len(rows) - len(prompts)
        log.warning("%s: dropped %d of %d prompts of %s", limit, dropped, len(rows), source)
    return prompts


def _question(row: Row, data: DataConfig) -> Question:
    """A plain string, or chat messages with the system prompt in place."""
    path = _path(row, data.prompt_column, PROMPT_COLUMNS)
    asked = _column(row, "prompt_column", path)
    key = f"data.prompt_column={path}"
    if isinstance(asked, str) and asked:
        if not data.chat_template:
            return f"{data.system_prompt or ''}{asked}"
        asked = [{"role": "user", "content": asked}]
    elif not (isinstance(asked, list) and asked and all(map(_is_message, asked))):
        reason = f"{key} is neither text nor a list of {{role, content}} messages but {asked!r:.80}"
        raise InputError(row.where, reason, "mend the row or choose another column")
    elif data.chat_template is False:
        reason = "cannot be: the prompts are chat messages"
        raise InputError(
            "data.chat_template=false", reason, f"unset it, or choose a text for {key}"
        )
    if data.system_prompt is None:
        return asked
    rest = asked[1:] if asked[0]["role"] == "system" else asked
    return [{"role": "system", "content": data.system_prompt}, *rest]


def _answer(row: Row, data: DataConfig) -> str:
    path = _path(row, data.answer_column, ANSWER_COLUMNS)
    return str(_column(row, "answer_column", path))


def _path(row: Row, named: str | None, usual: Sequence[str]) -> str:
    """The column that is named, else the first of the usual ones that `row` has."""
    if named is not None:
        return named
    columns = row.columns()
    return next((path for path in usual if path in columns), usual[0])


def _column(row: Row, key: str, path: str) -> Any:
    try:
        value = row.get(path)
    except KeyError:
        reason = f"has no column {path!r}"
    else:
        if value is not None:
            return value
        reason = f"has nothing in column {path!r}"
    way_out = f"mend the row or set data.{key}=... to one of {', '.join(row.columns())}"
    raise InputError(row.where, reason, way_out)


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _text(row: Row, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model reads, before tokenisation."""
    question = _question(row, data)
    if isinstance(question, str):
        return question
    if tokenizer.chat_template is None:
        reason = "has no chat template, which chat messages need"
        way_out = "name a tokenizer that has one, or prompts that are plain text"
        raise InputError(f"model.tokenizer={tokenizer.name_or_path}", reason, way_out)
    try:
        rendered = tokenizer.apply_chat_template(
            question, tokenize=False, add_generation_prompt=True, **data.chat_template_kwargs
        )
    except Exception as error:  # templates raise what they like
        reason = f"the chat template does not take these messages ({error})"
        raise InputError(
            row.where, reason, "see data.system_prompt and chat_template_kwargs"
        ) from error
    return str(rendered)


def _encode(
    rows: list[Row], texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens that `apply_chat_template(tokenize=True)` gives, for all texts at once."""
    try:
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    except Exception as error:  # a vocabulary without an unknown token meets an unknown character
        if len(rows) == 1:
            reason = f"the tokenizer cannot encode its prompt ({error})"
            raise InputError(
                rows[0].where, reason, "mend the row, or see model.tokenizer"
            ) from error
        return [_encode([row], [text], tokenizer)[0] for row, text in zip(rows, texts, strict=True)]
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            raise InputError(row.where, "the tokenizer leaves nothing of its prompt")
    return encoded
