from __future__ import annotations

import random
import unicodedata

import pytest

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask, words_of
from megatron_bupo.data.token_texts import token_texts
from tests.small_tokenizers import byte_fallback, byte_level, word_pieces

GRAMS = [
    "let me check",
    "wait, let me",
    "we can",
    "me",
    "don\u2019t we can",
    "a b a b",
    "strasse a",
]
GRAMS += ["我们可以", "let me check we can", "cafe\u0301 me"]
PARTS = "let Let me ME LET check wait , we can don't don\u2019t a b straße STRASSE café".split()
PARTS += ["我们", "可以", "我", "cafe\u0301", "🤔", "\uff2c\uff25\uff34", "…"]
GAPS = ["", " ", " ", "  ", "\n", ". ", "\u00a0"]


def dumb_words(text: str) -> list[str]:
    """Character by character, without a regular expression."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    text = unicodedata.normalize("NFKC", text)
    words: list[str] = []
    joins = False
    for i, c in enumerate(text):
        apostrophe = c == "'" and joins and text[i + 1 : i + 2].isalnum()
        letter = (c.isalnum() and not "\u4e00" <= c <= "\u9fff") or apostrophe
        if letter and joins:
            words[-1] += c
        elif not c.isspace():
            words.append(c)
        joins = letter
    return words


def quadratic(text: str, tokens: list[tuple[int, int]], grams: list[str]) -> list[bool]:
    """Try every piece of the text that begins and ends with a word of it."""
    planning = set()
    wanted, whole = [dumb_words(gram) for gram in grams], dumb_words(text)
    ends = [dumb_words(text[end:]) for end in range(len(text) + 1)]
    for start in range(len(text)):
        before = dumb_words(text[:start])
        for end in range(start + 1, len(text) + 1):
            inside = text[start:end]
            words = dumb_words(inside) if inside.strip() == inside else []
            if words in wanted and before + words + ends[end] == whole:
                planning |= set(range(start, end))
    return [any(place in planning for place in range(*token)) for token in tokens]


def random_text(rng: random.Random, parts: int) -> str:
    return "".join(rng.choice(PARTS) + rng.choice(GAPS) for _ in range(parts))


@pytest.mark.parametrize("seed", range(20))
def test_planning_tokens_are_those_of_a_search_through_all_substrings(seed: int):
    rng = random.Random(seed)
    text = random_text(rng, 14)
    cuts = sorted(rng.choices(range(len(text) + 1), k=12))  # some tokens have no characters
    tokens = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
    assert planning_mask(text, tokens, StrategicGrams(GRAMS)) == quadratic(text, tokens, GRAMS)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces])
def test_the_same_holds_for_the_tokens_of_each_kind_of_tokenizer(make):
    rng = random.Random(0)
    tokenizer = make([random_text(rng, 40) for _ in range(20)])
    for _ in range(8):
        ids = tokenizer.encode(random_text(rng, 12)).ids
        text, tokens = token_texts(ids, tokenizer.decode)
        found = planning_mask(text, tokens, StrategicGrams(GRAMS))
        assert found == quadratic(text, tokens, GRAMS)
        assert len(found) == len(ids)


def test_a_gram_is_found_whatever_its_case_and_the_space_in_it_and_not_inside_a_word():
    text = "Let  me\nCHECK. outlet me check, let me checkers"
    assert [found[1:] for found in StrategicGrams(["let me check"]).find(text)] == [(0, 13)]


def test_words_are_alike_whose_letters_differ_in_length_or_composition():
    pairs = [("STRASSE", "straße"), ("İ", "i\u0307"), ("caf\u00e9", "cafe\u0301"), ("ﬁnd", "find")]
    pairs += [("let's", "let\u2019s"), ("let's", "let\u02bcs"), ("\uff2c\uff25\uff34", "let")]
    for one, other in pairs:
        assert words_of(one) == words_of(other)
        assert len(words_of(one)) == 1
    assert StrategicGrams(["i am"]).find("ﬁ am hi am i\u0307 am") == []


def test_grams_inside_and_across_each_other_are_all_found():
    grams = StrategicGrams(["a b", "b c d", "a b c", "c"])
    assert {found.gram for found in grams.find("a b c d")} == {"a b", "a b c", "b c d", "c"}


def test_the_space_inside_a_gram_plans_and_the_space_before_it_does_not():
    text, tokens = " let me go", [(0, 4), (4, 5), (5, 7), (7, 7), (7, 8), (8, 10)]
    mask = planning_mask(text, tokens, StrategicGrams(["let me"]))
    assert mask == [True, True, True, False, False, False]


def test_no_grams_and_empty_grams_are_found_nowhere():
    assert StrategicGrams([]).find("let me") == StrategicGrams(["", "  "]).find("let me") == []
