"""Ways in which the tokenizer of a checkpoint goes wrong; see damaged_hf."""

from __future__ import annotations

from typing import Any

from tests.damaged_hf import (
    DEEP,
    SAME,
    TOKENIZER,
    Mutation,
    config,
    dangling,
    directory,
    edit,
    encoded,
    removed,
    text,
    truncated,
)

SETTINGS = "tokenizer_config.json"


def settings(**values: Any) -> Mutation:
    """tokenizer_config.json with these keys set."""
    return lambda folder: edit(folder / SETTINGS, lambda found: found | values)


def another_token(found: dict[str, Any]) -> None:
    found["model"]["vocab"]["beyond"] = 999


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "missing": (removed(TOKENIZER), TOKENIZER),
    "empty": (text(TOKENIZER, ""), TOKENIZER),
    "cut off": (truncated(TOKENIZER, lambda n: n // 2), TOKENIZER),
    "deep": (text(TOKENIZER, DEEP), TOKENIZER),
    "a list": (text(TOKENIZER, "[]"), TOKENIZER),
    "without a model": (text(TOKENIZER, "{}"), TOKENIZER),
    "with a BOM": (encoded(TOKENIZER, "utf-8-sig"), TOKENIZER),
    "in UTF-16": (encoded(TOKENIZER, "utf-16"), TOKENIZER),
    "a directory": (directory(TOKENIZER), TOKENIZER),
    "to nowhere": (dangling(TOKENIZER), TOKENIZER),
    "a token beyond the model's": (lambda f: edit(f / TOKENIZER, another_token), "beyond"),
    "of a model with a smaller vocabulary": (config(vocab_size=100), "vocabulary ends at 99"),
    "settings missing": (removed(SETTINGS), SETTINGS),
    "settings a directory": (directory(SETTINGS), SETTINGS),
    "settings cut off": (truncated(SETTINGS, lambda n: n // 2), SETTINGS),
    "settings a list": (text(SETTINGS, "[]"), SETTINGS),
    "settings deep": (text(SETTINGS, DEEP), SETTINGS),
    "settings of another class": (settings(tokenizer_class="NoSuchTokenizer"), SAME),
    "settings with an end that is a number": (settings(eos_token=5), "eos_token"),
}
