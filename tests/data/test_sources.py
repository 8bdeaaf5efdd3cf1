from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bupo.config.schema import DataConfig, SourceConfig
from megatron_bupo.data.prompts import check_rows, load_training
from megatron_bupo.data.sources import name_of, training_parts, training_sources
from megatron_bupo.errors import InputError
from tests.data.test_prompts import tokenizer as tokenizer  # noqa: PLC0414 - the fixture


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, *rows: dict) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def asking(*questions: str, answer: str = "1") -> list[dict[str, str]]:
    return [{"prompt": question, "answer": answer} for question in questions]


def kept(data: DataConfig, *benchmarks: str) -> tuple[list[list[str]], list[str]]:
    """What is asked, by source, and what is said."""
    from megatron_bupo.data.prompts import _evaluation

    parts, notes = training_parts(data, _evaluation(data, benchmarks))
    return [[question.asked for question in part.questions] for part in parts], notes


def test_a_mixtures_prompts_know_their_source_and_rows_are_counted_through(
    write, tokenizer, tmp_path
) -> None:
    first = write("a.jsonl", *asking("1", "1", "3" * 9, "4"), {"prompt": ""})
    (tmp_path / "b.csv").write_text("problem,gold\n6,x\n7,y\n")
    data = DataConfig(
        sources=[
            SourceConfig(first, weight=3),
            SourceConfig(f"{tmp_path}/b.csv", "sums", 0.5, answer_column="gold"),
        ],
        max_prompt_tokens=5,
        deduplicate=True,
        bad_rows="skip",
    )
    (three, a), (half, b) = load_training(data, tokenizer)
    assert (three, half) == (3, 0.5)
    assert [(p.index, p.text, p.answer, p.source) for p in [*a, *b]] == [
        (0, "1", "1", "a"),
        (3, "4", "1", "a"),
        (5, "6", "x", "sums"),
        (6, "7", "y", "sums"),
    ]
    plain = DataConfig(train=first, bad_rows="skip")
    [(_, alone)] = load_training(plain, tokenizer)
    assert [(p.index, p.source) for p in alone] == [(i, None) for i in range(4)]


def test_sources_are_named_after_their_files_and_equal_names_get_their_number() -> None:
    paths = ["org/DeepMath-103K:train", "x/train.jsonl", "y/train.parquet", "my data.csv"]
    sources = training_sources(DataConfig(sources=[SourceConfig(path) for path in paths]))
    assert [source.name for source in sources] == ["DeepMath-103K", "train#1", "train#2", "my_data"]
    assert name_of("NAME") == "NAME"


def test_bad_rows_of_all_files_are_refused_at_once_each_by_file_and_row(write) -> None:
    train = write("train.jsonl", *asking("1", ""), {"prompt": "2"})
    held = write("eval.jsonl", *asking("3"), {"answer": "4"})
    data = DataConfig(train=train, eval=held)
    with pytest.raises(InputError) as caught:
        check_rows(data)
    assert str(caught.value) == (
        f"3 of 5 rows are bad: {train} row 2 (line 2): column 'prompt' is empty; "
        f"{train} row 3 (line 3): has no column 'answer'; "
        f"{held} row 2 (line 2): has no column 'prompt'; mend the row or choose another column; "
        "training goes without with data.bad_rows=skip"
    )


def test_skipping_leaves_bad_training_rows_out_but_never_one_of_the_evaluation(write) -> None:
    train = write("train.jsonl", *asking("1", "", "2"))
    data = DataConfig(train=train, bad_rows="skip")
    asked, [note] = kept(data)
    assert asked == [["1", "2"]]
    assert note == (
        "data.bad_rows=skip: 1 of 3 rows are bad and left out: "
        f"{train} row 2 (line 2): column 'prompt' is empty"
    )
    held = write("eval.jsonl", *asking("3", ""))
    with pytest.raises(InputError, match=r"eval.jsonl row 2 .*is empty"):
        check_rows(replace(data, eval=held))
    with pytest.raises(InputError, match=r"eval.jsonl row 2 .*is empty"):
        check_rows(data, [held])
    empty = write("empty.jsonl", *asking("", ""))
    with pytest.raises(InputError, match=r"=skip: leaves no rows: 2 of 2 rows are bad: .* row 1"):
        check_rows(replace(data, train=empty))


def test_repeated_questions_are_dropped_over_all_sources_and_counted(write) -> None:
    one = write("one.jsonl", *asking("Find $x$.", "Find y.", "find  X."))
    two = write("two.jsonl", *asking("find\ny.", "Find z.", answer="2"))
    data = DataConfig(sources=[SourceConfig(one), SourceConfig(two)])
    assert [len(part) for part in kept(data)[0]] == [3, 2]
    asked, [note] = kept(replace(data, deduplicate=True))
    assert asked == [["Find $x$.", "Find y."], ["Find z."]]
    assert note == (
        "data.deduplicate: dropped 2 of 5 questions that were asked before, 1 of them with another "
        f"answer: {one} row 3 (line 3) repeats {one} row 1 (line 1); "
        f"{two} row 1 (line 1) repeats {one} row 2 (line 2)"
    )


def test_questions_of_the_evaluation_are_told_dropped_or_refused(write) -> None:
    train = write("train.jsonl", *asking("a?", "B ?", "c?", "d?", "e?", "f?"))
    held = write("eval.jsonl", *asking("b?", "z?"))
    other = write("other.jsonl", *asking("f?", "c?", "d?"))
    data = DataConfig(train=train, eval=held)
    asked, [note] = kept(data)
    where = f"{train} row 2 (line 2) repeats {held} row 1 (line 1)"
    told = f"1 of 6 training questions are asked by evaluation: {where}"
    assert (asked, note) == (
        [["a?", "B ?", "c?", "d?", "e?", "f?"]],
        f"data.contamination=warn: {told}",
    )
    asked, [note] = kept(replace(data, contamination="drop"), other)
    assert asked == [["a?", "e?"]]
    assert "4 of 6 training questions are asked by evaluation and dropped: " in note
    assert note.endswith("; and 1 more")
    with pytest.raises(InputError) as caught:
        kept(replace(data, contamination="refuse"))
    assert str(caught.value).startswith(f"data.contamination=refuse: {told}; set data.")
    with pytest.raises(InputError, match=r"^data.train=.*none of its questions is left"):
        kept(DataConfig(train=train, eval=train, contamination="drop"))


def test_the_prompts_that_are_trained_on_are_those_that_preflight_leaves(write, tokenizer) -> None:
    train, held = write("train.jsonl", *asking("a?", "b?")), write("eval.jsonl", *asking("b?"))
    for contamination, expected in {"warn": ["a?", "b?"], "drop": ["a?"]}.items():
        data = DataConfig(train=train, eval=held, contamination=contamination)
        [(_, prompts)] = load_training(data, tokenizer)
        assert [prompt.text for prompt in prompts] == expected
        by_benchmark = replace(data, eval=None)
        [(_, prompts)] = load_training(by_benchmark, tokenizer, [held])
        assert [prompt.text for prompt in prompts] == expected
