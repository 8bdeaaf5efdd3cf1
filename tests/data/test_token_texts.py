from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_bupo.data.token_texts import token_texts

TEXTS = [
    "Let me check: 4+9=13, naïve façade.",
    "我们可以 验证 一下 🤔🤔",
    "  two  spaces\n\tand a tab",
]


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's: a token is any bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: spaces are marks, the first one is dropped, unknown characters are bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = sorted({c for c in TEXTS[0] if c.isascii()} | set("▁abcdefghijklmnopqrstuvwxyz"))
    vocab |= {c: 256 + i for i, c in enumerate(letters) if c != " "}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokens_together_are_the_text_and_none_is_half_a_character(make: Callable[[], Tokenizer]):
    tokenizer = make()
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        decoded, spans = token_texts(ids, tokenizer.decode)
        assert decoded == tokenizer.decode(ids) == text
        assert len(spans) == len(ids)
        assert "�" not in decoded
        assert {place for span in spans for place in range(*span)} == set(range(len(text)))
        assert all(after[0] >= before[1] - 1 for before, after in pairwise(spans))


def test_the_bytes_of_a_character_all_stand_for_it():
    tokenizer = byte_fallback()
    ids = tokenizer.encode("a🤔b").ids
    text, spans = token_texts(ids, tokenizer.decode)
    assert text == "a🤔b"
    assert spans[-6:] == [(0, 1), *[(1, 2)] * 4, (2, 3)]


def test_tokens_cut_anywhere_stand_for_the_characters_that_they_have_bytes_of():
    rng = random.Random(0)
    text = " 🤔me我们 é wait👩\u200d🔬 é\u0301\n" * 40
    whole, pieces = text.encode(), []
    while whole:
        size = rng.randrange(1, 6)
        pieces.append(whole[:size])
        whole = whole[size:]
    decoded, spans = token_texts(
        range(len(pieces)), lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
    )
    assert decoded == text
    characters = iter([i for i, c in enumerate(text) for _ in c.encode()])
    for piece, span in zip(pieces, spans, strict=True):
        mine = [next(characters) for _ in piece]
        assert span == (mine[0], mine[-1] + 1)


def test_bytes_that_are_no_character_spoil_only_their_neighbourhood():
    tokenizer = byte_level()
    rng = random.Random(0)
    good = tokenizer.encode(TEXTS[0]).ids
    bad = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(40)]
    text, spans = token_texts([*good, *bad, *good], tokenizer.decode)
    assert len(spans) == 2 * len(good) + len(bad)
    assert text.startswith(TEXTS[0])
    assert text.endswith(TEXTS[0][8:])
    assert spans == sorted(spans)
