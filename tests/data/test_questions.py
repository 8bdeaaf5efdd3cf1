from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.questions import BOXED, read_question
from megatron_bupo.data.rows import Row, read_rows
from megatron_bupo.errors import InputError

OCTOTHINKER = (  # Figure 10 of the paper, typed a second time
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. User: You must put your answer inside \\boxed{} and Your "
    "final answer will be extracted automatically by the \\boxed{} tag.\n1+1?\nAssistant:"
)
USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [SYSTEM, USER]
ASKS_BOXED = {"role": "system", "content": BOXED}
FILLED = {"role": "user", "content": "Q: 1+1? A:"}


def row(**values: Any) -> Row:
    return Row(0, "rows.jsonl row 1", {"prompt": "1+1?", "answer": "2"} | values)


@pytest.mark.parametrize(
    ("prompt", "data", "expected"),
    [
        ("1+1?", DataConfig(prompt_template="boxed"), [ASKS_BOXED, USER]),
        ([USER], DataConfig(prompt_template="boxed"), [ASKS_BOXED, USER]),
        (CHAT, DataConfig(prompt_template="boxed"), [ASKS_BOXED, USER]),
        ("1+1?", DataConfig(prompt_template="octothinker"), OCTOTHINKER),
        (CHAT, DataConfig(prompt_template="octothinker"), OCTOTHINKER),
        (CHAT, DataConfig(prompt_template="octothinker", chat_template=False), OCTOTHINKER),
        ("1+1?", DataConfig(prompt_template="Q: {question} A:"), "Q: 1+1? A:"),
        ("1+1?", DataConfig(prompt_template="Q: {question} A:", chat_template=True), [FILLED]),
        (CHAT, DataConfig(prompt_template="Q: {question} A:"), [SYSTEM, FILLED]),
        (CHAT, DataConfig(prompt_template="Q: {question} A:", chat_template=False), "Q: 1+1? A:"),
        (
            CHAT,
            DataConfig(prompt_template="Q: {question} A:", chat_template=True, system_prompt="!"),
            [{"role": "system", "content": "!"}, FILLED],
        ),
        ([{**USER, "name": None}], DataConfig(), [USER]),  # as parquet fills up messages
    ],
)
def test_a_template_is_put_around_the_question_whatever_holds_it(prompt, data, expected) -> None:
    question = read_question(row(prompt=prompt), data)
    assert question.prompt == expected
    assert (question.asked, question.answer) == ("1+1?", "2")


def test_a_template_takes_one_user_message_and_a_question_with_braces_is_not_filled_in() -> None:
    more = [USER, {"role": "assistant", "content": "2"}, USER]
    with pytest.raises(InputError, match=r"takes one user message, and its prompt has \[user, as"):
        read_question(row(prompt=more), DataConfig(prompt_template="boxed"))
    assert read_question(row(prompt=more), DataConfig()).asked == "1+1?\n1+1?"
    template = DataConfig(prompt_template="{question}!")
    assert read_question(row(prompt="Why {question}?"), template).prompt == "Why {question}?!"


def test_kwargs_that_no_template_would_read_are_refused() -> None:
    data = DataConfig(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(InputError, match=r"goes without data.chat_template_kwargs; set data.chat"):
        read_question(row(), data)
    assert read_question(row(prompt=CHAT), data).prompt == CHAT


@pytest.mark.parametrize(
    ("value", "answer"),
    [("x^2", "x^2"), (3, "3"), (27.0, "27"), (0.5, "0.5"), (["7"], "7"), (True, "True"), (0, "0")],
)
def test_an_answer_is_text(value: Any, answer: str) -> None:
    assert read_question(row(answer=value), DataConfig()).answer == answer


@pytest.mark.parametrize(
    ("values", "asked", "answer"),
    [
        ({"question": "q", "final_answer": "a", "topic": "t"}, "q", "a"),  # DeepMath-103K
        (
            {
                "data_source": "math_dapo",  # DAPO-Math-17k
                "prompt": [{"content": "q", "role": "user"}],
                "reward_model": {"ground_truth": "a", "style": "rule"},
            },
            "q",
            "a",
        ),
        ({"problem": "q", "solution": "long", "answer": "a", "level": 3}, "q", "a"),  # MATH-500
        ({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 33}, "q", "33"),
        ({"id": 0, "question": "q", "answer": 27.0, "url": "u"}, "q", "27"),  # amc23
    ],
)
def test_the_columns_of_well_known_data_sets_are_found(values, asked: str, answer: str) -> None:
    question = read_question(Row(0, "", values), DataConfig())
    assert (question.asked, question.answer) == (asked, answer)


@pytest.fixture(params=["deepmath-5k", "math500", "aime_2024"])
def authors_file(request) -> Path:
    """The authors' files, where `data/` has them."""
    path = Path(__file__).parents[2] / "data" / f"{request.param}.parquet"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def test_the_authors_files_need_no_column_keys(authors_file: Path) -> None:
    rows = list(read_rows(str(authors_file)))
    for values in rows:
        question = read_question(values, DataConfig(prompt_template="boxed"))
        assert question.prompt == values.values["prompt"]  # which says the same already
        assert question.answer == values.values["reward_model"]["ground_truth"]
    assert len(rows) in {5000, 500, 30}


def test_a_file_in_the_layout_of_the_authors_is_asked_as_it_stands(tmp_path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = {
        "data_source": "qwen_math500",
        "prompt": [ASKS_BOXED, USER],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": -1, "split": None},
    }
    parquet.write_table(pa.Table.from_pylist([values]), tmp_path / "math500.parquet")
    [read] = read_rows(f"{tmp_path}/math500.parquet")
    assert json.loads(json.dumps(read.values)) == values
    assert read_question(read, DataConfig()).prompt == [ASKS_BOXED, USER]
