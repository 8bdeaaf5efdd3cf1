"""What can a model of 260,000 parameters learn to reason about in a minute? Chain sums.

    4+9+3+6=  ->  >13>16>22#22$          the running sums, then `#`, the answer and `$` (end)

Demonstrations are flawed on purpose, so that the base model is right about a quarter of the time
and reinforcement has something to elicit: a carry is forgotten half of the time, other sums slip
now and then, errors propagate, and a fifth of the demonstrations guess without a trace, mostly
wrongly.

There are 10,000 prompts. Every 39th, from number 19 on, is held out: 256 prompts that neither the
demonstrations nor reinforcement ever show.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

Operands = tuple[int, int, int, int]

CHARACTERS = "0123456789+=>#$_"  # a token each; its id is its place
END, PAD = "$", "_"
TOKEN_IDS = {character: i for i, character in enumerate(CHARACTERS)}
PROMPT_TOKENS = len("4+9+3+6=")

CARRY_FORGOTTEN = 0.5
SLIP = 0.02
NO_TRACE = 0.2
GUESS_RIGHT = 0.15


def _operands(number: int) -> Operands:
    """Prompt `number` of 10,000: its four digits."""
    a, b, c, d = (int(digit) for digit in f"{number:04d}")
    return a, b, c, d


_HELD_OUT = range(19, 10_000, 39)  # 39 and 10 are coprime: every digit is as frequent as elsewhere
EVAL = tuple(_operands(number) for number in _HELD_OUT)
TRAIN = tuple(_operands(number) for number in range(10_000) if number not in _HELD_OUT)


def prompt(operands: Operands) -> str:
    """`4+9+3+6=`."""
    return "+".join(map(str, operands)) + "="


def demonstration(operands: Operands, rng: random.Random) -> str:
    """A flawed response, `$` included."""
    if rng.random() < NO_TRACE:
        return f"#{_guess(sum(operands), rng)}{END}"
    total, *rest = operands
    trace = ""
    for operand in rest:
        carries = total % 10 + operand >= 10
        total += operand
        if carries and rng.random() < CARRY_FORGOTTEN:
            total -= 10
        elif rng.random() < SLIP:
            total = max(0, total + rng.choice([-2, -1, 1, 2]))
        trace += f">{total}"
    return f"{trace}#{total}{END}"


def _guess(total: int, rng: random.Random) -> int:
    if rng.random() < GUESS_RIGHT:
        return total
    return max(0, total + rng.choice([-10, -5, -3, -2, -1, 1, 2, 3, 5, 10]))


def reward(response: str, answer: str) -> float:
    """1 for exactly the answer after the last `#`, else 0.

    `response` is text as the engines decode it: without special tokens, so without the `$`.
    """
    _, mark, given = response.rpartition("#")
    return float(bool(mark) and given == answer)


def encode(text: str) -> list[int]:
    """Token ids of `text`, a token per character."""
    return [TOKEN_IDS[character] for character in text]


def jsonl(prompts: tuple[Operands, ...]) -> str:
    """The data file of `prompts`: a row `{"prompt": "4+9+3+6=", "answer": "22"}` each."""
    rows = ({"prompt": prompt(operands), "answer": str(sum(operands))} for operands in prompts)
    return "".join(json.dumps(row) + "\n" for row in rows)


def save_tokenizer(directory: Path) -> None:
    """Write the character tokenizer, as `AutoTokenizer` reads it."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(vocab=TOKEN_IDS, merges=[]))  # without merges: a character at a time
    tokenizer.decoder = Fuse()  # nothing between tokens
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END, PAD)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
