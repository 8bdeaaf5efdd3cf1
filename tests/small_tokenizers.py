"""Small tokenizers of the kinds that there are, trained on what a test needs."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def byte_level(texts: Sequence[str], size: int = 300) -> Tokenizer:
    """As Qwen's, Llama 3's, GPT-2's: a token is any bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_fallback(texts: Sequence[str], size: int = 300) -> Tokenizer:
    """As Llama 2's: spaces are marks, the first one is dropped, unknown characters are bytes."""
    learned = Tokenizer(models.BPE())
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    learned.normalizer = normalizers.Sequence(marks)
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=30, show_progress=False)
    learned.train_from_iterator(texts, trainer)
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_pieces(texts: Sequence[str], size: int = 300) -> Tokenizer:
    """As BERT's: words are cut into pieces, and what space there was between them is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
