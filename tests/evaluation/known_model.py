"""A model whose chance to be right is known for every question, and the law of a suite's scores.

The layer's output projections are zero, so the logits are W norm(e) of the last token alone: a
formula of two lines, which `chances` computes by itself from the tensors on disk. A question is one
token, its answer another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.run_files import write_tokenizer

QUESTIONS = 32
WORDS = ["<pad>", "yes", "no", *(f"q{i}" for i in range(QUESTIONS))]
RIGHT = np.geomspace(0.002, 0.95, QUESTIONS)  # about what the model is made to get right
REWARD = """
def reward(response, answer):
    return float(response == answer)
"""


class Known(NamedTuple):
    """Where it is, the questions and the reward function beside it."""

    model: Path
    data: Path
    reward: str


def make_known_model(folder: Path) -> Known:
    """Write it."""
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=QUESTIONS,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.zeros(len(WORDS), QUESTIONS))
        model.lm_head.weight.fill_(-60 / QUESTIONS**0.5)
        for i, right in enumerate(RIGHT):
            model.model.embed_tokens.weight[WORDS.index(f"q{i}"), i] = 3.0
            logit = float(np.log(right / (1 - right))) / QUESTIONS**0.5
            model.lm_head.weight[WORDS.index("yes"), i] = logit if answer(i) == "yes" else -logit
            model.lm_head.weight[WORDS.index("no"), i] = 0.0
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model", {word: i for i, word in enumerate(WORDS)})
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(kind))
    rows = [{"prompt": f"q{i}", "answer": answer(i)} for i in range(QUESTIONS)]
    (folder / "known.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "known_reward.py").write_text(REWARD)
    return Known(folder / "model", folder / "known.jsonl", f"{folder / 'known_reward.py'}:reward")


def answer(question: int) -> str:
    return "yes" if question % 3 else "no"


def chances(known: Known, *, temperature: float) -> np.ndarray:
    """The chance that the first token answers each question, `[questions]`."""
    weights = {
        k: v.astype(np.float64) for k, v in load_file(known.model / "model.safetensors").items()
    }
    found = []
    for i in range(QUESTIONS):
        embedding = weights["model.embed_tokens.weight"][WORDS.index(f"q{i}")]
        normed = embedding / np.sqrt((embedding**2).mean() + 1e-6) * weights["model.norm.weight"]
        likely = np.exp(weights["lm_head.weight"] @ normed / temperature)
        found.append(likely[WORDS.index(answer(i))] / likely.sum())
    return np.array(found)


STEP = 1e-3  # of the grid that a question's score is rounded to


def p_value(observed: float, right: np.ndarray, scores: Sequence[float]) -> float:
    """A bound from above on the chance that the mean over questions of `scores[c]` is as far out
    as `observed` or farther, on either side, where c of n responses are correct with chance `right`
    each, `[questions]`.

    The law of the sum is that of the questions' laws folded, on a grid; each question may be half a
    step off, which the bound gives away.
    """
    places = np.array([round(score / STEP) for score in scores])
    size = 2 ** int(np.ceil(np.log2(len(right) * (places.max() + 1))))
    law = np.ones(size // 2 + 1, dtype=np.complex128)
    for p in right:
        law *= np.fft.rfft(np.bincount(places, count_law(p, len(scores) - 1), size))
    sums = np.fft.irfft(law, size).clip(0)
    at, slack = observed * len(right) / STEP, len(right) / 2 + 1
    grid = np.arange(size)
    below, above = sums[grid <= at + slack].sum(), sums[grid >= at - slack].sum()
    return float(min(1.0, 2 * min(below, above)))


def count_law(p: float, n: int) -> np.ndarray:
    """The chance of each number of correct responses among n, `[n + 1]`."""
    return np.array([comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])


def correct_counts(path: Path) -> Sequence[int]:
    """Of each question in an evaluation's file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [sum(r["correctness"] == 1 for r in line["responses"]) for line in lines]
