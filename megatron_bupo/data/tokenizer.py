"""The tokenizer of a checkpoint directory, never of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
_WAY_OUT = "set model.tokenizer to a directory with tokenizer.json and tokenizer_config.json"


def has_chat_template(directory: str) -> bool:
    """Do the files of the tokenizer in `directory` hold a chat template? Without transformers."""
    folder = Path(directory)
    if any(folder.glob("*chat_template*")):  # .jinja, .json, a folder of several
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def no_chat_template(directory: str) -> InputError:
    """What chat messages are refused with where there is none."""
    reason = "has no chat template, which chat messages need"
    way_out = "name a tokenizer that has one, or prompts that are plain text"
    return InputError(f"model.tokenizer={directory}", reason, way_out)


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, as `save_pretrained` left it there."""
    where = f"model.tokenizer={directory}"
    if not Path(directory).is_dir():
        raise InputError(where, "there is no such directory", _WAY_OUT)
    if not (Path(directory) / SETTINGS).is_file():
        # By the model's family transformers would choose a class, and that class how words are cut
        # before tokenizer.json is asked: other tokens than the model has learned, and no error.
        raise InputError(where, f"has no {SETTINGS}", _WAY_OUT)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError, and what the Rust side raises
        reason = f"transformers finds no tokenizer in it ({type(error).__name__}: {error})"
        raise InputError(where, reason, _WAY_OUT) from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        # what transformers makes up for a checkpoint that has a config.json but no tokenizer files
        raise InputError(where, "holds no tokenizer, or one of special tokens only", _WAY_OUT)
    return tokenizer
