"""What every engine agrees on: which prompts a model can read, what ends a response, its text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import eos_token_ids, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_bupo.types import Prompt


def check_prompt(
    prompt: Prompt, *, context: int, vocab_size: int, max_response_tokens: int
) -> None:
    """Refuse what the model cannot read, before anything is generated. A server dies of a token
    outside its vocabulary.
    """
    where = f"data row {prompt.index}"
    room = context - max_response_tokens
    if not 1 <= len(prompt.input_ids) <= room:
        raise InputError(
            f"{where}: a prompt of {len(prompt.input_ids)} tokens",
            f"the model's context of {context} leaves 1 to {room} beside "
            f"rollout.max_response_tokens={max_response_tokens}",
            "lower data.max_prompt_tokens or rollout.max_response_tokens",
        )
    for token in (min(prompt.input_ids), max(prompt.input_ids)):
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{where}: token id {token}",
                f"the model's vocabulary holds 0 to {vocab_size - 1}",
                "set model.tokenizer to the model's own",
            )


def stop_ids(model_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's eos and those of the generation config, or
    without one of the model's config.
    """
    config = Path(model_dir) / "config.json"
    named = eos_token_ids(Path(model_dir), read_json_object(config) if config.exists() else {})
    own: Any = tokenizer.eos_token_id
    return tuple(sorted({*named, *([] if own is None else [int(own)])}))


def text_of(response_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A response decoded, without special tokens."""
    text = tokenizer.decode(
        [*response_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
