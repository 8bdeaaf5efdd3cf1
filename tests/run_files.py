"""The files that a run reads, small: a model with its tokenizer, and questions with answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCABULARY = {
    word: i
    for i, word in enumerate(
        ["<pad>", "<end>", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "="]
    )
}


@dataclass(frozen=True)
class RunFiles:
    """Where they are, and the settings that name them and fit them."""

    model: Path
    data: Path
    settings: tuple[str, ...]


def write_run_files(folder: Path, model: Path) -> RunFiles:
    """Copy `model` (64 tokens, 256 positions) to `folder` and put the rest beside it."""
    copied, data = folder / "model", folder / "train.jsonl"
    shutil.copytree(model, copied)
    write_tokenizer(copied, VOCABULARY)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"run_dir={folder / 'run'}",
        f"model.path={copied}",
        f"data.train={data}",
        "data.max_prompt_tokens=8",
        "rollout.max_response_tokens=8",
        "reward.function=exact_match",
    )
    return RunFiles(copied, data, settings)


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    """A tokenizer of whole words, as little as a tokenizer can be."""
    Tokenizer(WordLevel(vocabulary, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
