"""From a data row to what is asked and what the answer is; text, no tokens yet.

A prompt column holds a string or a list of chat messages. Messages go through the tokenizer's chat
template; strings are read as they stand unless `data.chat_template=true` makes them one user
message. `data.system_prompt` comes first: as the system message (in place of one that the row
brings), or as text in front of a plain string.

`data.prompt_template` is put around the question, which is the string or the one user message:

    boxed         the BuPO paper's Qwen runs: a system message that asks for \\boxed{}, and the
                  question as the user message
    octothinker   the BuPO paper's Figure 10, for base models: plain text, no chat template, and
                  nothing of the row but the question
    a text        its {question} is the question. The row's system message stays, unless
                  `data.chat_template=false` makes the text all that is read
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.contamination import normal_form
from megatron_bupo.data.rows import Row
from megatron_bupo.errors import InputError

Message = dict[str, str]

# What columns are usually called, the likelier first; as they are or in another case
PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer")

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
# Word for word as `orz_base` in the authors' rl_dataset.py, whose [PROMPT] is our {question}
OCTOTHINKER = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. User: You must put your answer inside \\boxed{} and Your final answer "
    "will be extracted automatically by the \\boxed{} tag.\n{question}\nAssistant:"
)
SLOT = "{question}"


@dataclass(frozen=True)
class Question:
    """A row, understood."""

    row: Row
    prompt: str | Sequence[Message]  # plain text, or what the chat template renders
    asked: str  # the question alone, as the row has it
    answer: str  # "": none is asked for

    @cached_property
    def normal_form(self) -> str:
        """Equal for questions that ask the same in the same words."""
        return normal_form(self.asked)


def read_question(
    row: Row, data: DataConfig, *, section: str = "data", answers: bool = True
) -> Question:
    """What `row` asks; InputError where that cannot be told. `section` has the columns' names."""
    path = _path(row, data.prompt_column, PROMPT_COLUMNS)
    value = _column(row, f"{section}.prompt_column", path)
    found = value if isinstance(value, str) else _messages(row, f"column {path!r}", value)
    asked = found if isinstance(found, str) else "\n".join(_contents(found, "user"))
    _refuse_unreadable(row, f"column {path!r}", found if isinstance(found, str) else asked)
    answer = _answer(row, data.answer_column, section) if answers else ""
    return Question(row, _prompt(row, found, data), asked, answer)


def _messages(row: Row, column: str, value: Any) -> list[Message]:
    """The chat that `value` is."""
    if not (isinstance(value, list) and value and all(map(_is_message, value))):
        shown = reprlib.repr(value)
        reason = f"{column} is neither text nor a list of {{role, content}} messages but {shown}"
        raise InputError(row.where, reason, "mend the row or choose another column")
    # what is null stands for no such field in a parquet file, where all messages have all fields
    messages = [{k: v for k, v in message.items() if v is not None} for message in value]
    if not any(_contents(messages, "user")) or messages[-1]["role"] == "assistant":
        reason = f"{column} is a chat without a question"
        if messages[-1]["role"] == "assistant":
            reason = f"{column} is a chat that ends with the assistant's words"
        raise InputError(row.where, reason, "mend the row or choose another column")
    return messages


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _contents(messages: Sequence[Message], role: str) -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def _refuse_unreadable(row: Row, what: str, text: str) -> None:
    """Text that is none, or that cannot be sent and written."""
    reason = ""
    if not text.strip():
        reason = "is empty"
    elif "\0" in text:
        reason = "holds a NUL character"
    elif text.lstrip().startswith("[{") and "role" in text and "content" in text:
        reason = "is a list of chat messages written as text; JSONL and parquet hold lists"
    elif not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            reason = "holds half a character (a lone surrogate)"
    if reason:
        raise InputError(row.where, f"{what} {reason}", "mend the row or choose another column")


def _prompt(row: Row, found: str | list[Message], data: DataConfig) -> str | list[Message]:
    """What the model is asked: templates and the system prompt in place."""
    around = data.prompt_template
    if around is not None:
        question = found if isinstance(found, str) else _only_user_message(row, found)
        system = [] if isinstance(found, str) else [m for m in found if m["role"] == "system"]
        if around == "octothinker":
            return OCTOTHINKER.replace(SLOT, question)
        if around == "boxed":
            return [_message("system", BOXED), _message("user", question)]
        filled = around.replace(SLOT, question)
        if data.chat_template is False:
            return filled
        found = filled if isinstance(found, str) else [*system, _message("user", filled)]
    if isinstance(found, str):
        if not data.chat_template:
            return _plain(row, found, data)
        found = [_message("user", found)]
    elif data.chat_template is False:
        reason = "its prompt is chat messages, and data.chat_template=false wants plain text"
        raise InputError(row.where, reason, "unset data.chat_template, or choose another column")
    if data.system_prompt is None:
        return found
    rest = found[1:] if found[0]["role"] == "system" else found
    return [_message("system", data.system_prompt), *rest]


def _plain(row: Row, text: str, data: DataConfig) -> str:
    if data.chat_template_kwargs:
        reason = "its prompt is plain text, which goes without data.chat_template_kwargs"
        raise InputError(row.where, reason, "set data.chat_template=true")
    return f"{data.system_prompt or ''}{text}"


def _only_user_message(row: Row, messages: Sequence[Message]) -> str:
    others = [m["role"] for m in messages if m["role"] != "system"]
    if others != ["user"]:
        reason = f"data.prompt_template takes one user message, and its prompt has {others}"
        raise InputError(row.where, reason.replace("'", ""), "set data.prompt_template=null")
    return _contents(messages, "user")[0]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _answer(row: Row, named: str | None, section: str) -> str:
    """The one answer, as text; 27.0 is 27."""
    path = _path(row, named, ANSWER_COLUMNS)
    key = f"{section}.answer_column"
    value = _column(row, key, path)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    reason = ""
    if isinstance(value, list):
        reason = f"is a list of {len(value)}, and a response is compared with one answer"
    elif isinstance(value, Mapping):
        reason = f"holds several fields; set {key}={path}.FIELD"
    elif isinstance(value, float | Decimal) and not math.isfinite(value):
        reason = f"is {value}, which is no number"
    elif not isinstance(value, str | int | float | Decimal):
        reason = f"is neither text nor a number but {reprlib.repr(value)}"
    if reason:
        raise InputError(row.where, f"column {path!r} {reason}", "mend the row")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    answer = str(value)
    _refuse_unreadable(row, f"column {path!r}", answer)
    return answer


def _path(row: Row, named: str | None, usual: Sequence[str]) -> str:
    """The column that is named, else the first of the usual ones that `row` has."""
    if named is not None:
        return named
    for path in usual:
        if row.has(path):
            return path
    lowered = {path.lower(): path for path in reversed(row.columns())}
    return next((lowered[path] for path in usual if path in lowered), usual[0])


def _column(row: Row, key: str, path: str) -> Any:
    try:
        value = row.get(path)
    except KeyError:
        reason = f"has no column {path!r}"
    else:
        if value is not None:
            return value
        reason = f"has nothing in column {path!r}"
    columns = ", ".join(row.columns())
    raise InputError(row.where, reason, f"mend the row or set {key}=... to one of {columns:.200}")
