from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.prompts import check_rows, load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import InputError

TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}"
    "<{{ m.role[0] }}>{{ m.content }};"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<a>{%- if not think | default(true) -%}-{%- endif -%}"
    "{%- endif -%}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character."""
    characters = {chr(code): code - 32 for code in range(32, 127)}
    model = Tokenizer(models.WordLevel(characters))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TEMPLATE)


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def chat(*pairs: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), pair.split(" ", 1), strict=True)) for pair in pairs]


def test_a_plain_prompt_is_tokenised_as_it_stands(write, tokenizer) -> None:
    source = write({"prompt": "1+2=", "answer": 3, "kind": "sum"}, {"prompt": "4=", "answer": "4"})
    first, second = load_prompts(source, DataConfig(), tokenizer)
    assert first.text == "1+2="
    assert first.input_ids == tuple(ord(c) - 32 for c in "1+2=")
    assert (first.index, first.answer) == (0, "3")
    assert first.row == {"prompt": "1+2=", "answer": 3, "kind": "sum"}
    assert (second.index, second.answer) == (1, "4")


MESSAGES = chat("system Be brief.", "user 1+2=")


@pytest.mark.parametrize(
    ("prompt", "config", "text"),
    [
        ("1+2=", DataConfig(system_prompt="Add. "), "Add. 1+2="),
        ("1+2=", DataConfig(chat_template=True), "<u>1+2=;<a>"),
        ("1+2=", DataConfig(chat_template=True, system_prompt="Add."), "<s>Add.;<u>1+2=;<a>"),
        (MESSAGES, DataConfig(), "<s>Be brief.;<u>1+2=;<a>"),
        (MESSAGES, DataConfig(system_prompt="Add."), "<s>Add.;<u>1+2=;<a>"),
        (MESSAGES[1:], DataConfig(system_prompt="Add."), "<s>Add.;<u>1+2=;<a>"),
        (MESSAGES[1:], DataConfig(chat_template_kwargs={"think": False}), "<u>1+2=;<a>-"),
    ],
)
def test_the_system_prompt_and_the_chat_template_are_put_around_the_prompt(
    write, tokenizer, prompt, config: DataConfig, text: str
) -> None:
    [loaded] = load_prompts(write({"prompt": prompt, "answer": "3"}), config, tokenizer)
    assert loaded.text == text
    assert loaded.input_ids == tuple(ord(c) - 32 for c in text)


def test_chat_messages_become_the_tokens_that_the_tokenizers_own_template_call_gives(
    write, tokenizer
) -> None:
    [prompt] = load_prompts(write({"prompt": MESSAGES, "answer": "3"}), DataConfig(), tokenizer)
    direct = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    assert list(prompt.input_ids) == direct["input_ids"]


def test_columns_are_found_by_dotted_path(write, tokenizer) -> None:
    config = DataConfig(prompt_column="task.text", answer_column="reward_model.ground_truth")
    row = {"task": {"text": "1+2="}, "reward_model": {"ground_truth": "3"}}
    [prompt] = load_prompts(write(row), config, tokenizer)
    assert (prompt.text, prompt.answer) == ("1+2=", "3")


def test_over_long_prompts_are_dropped_with_a_count_and_keep_their_row_numbers(
    write, tokenizer, caplog
) -> None:
    source = write(*({"prompt": "1" * length, "answer": "1"} for length in (4, 5, 3, 9)))
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(source, DataConfig(max_prompt_tokens=4), tokenizer)
    assert [prompt.index for prompt in prompts] == [0, 2]
    [record] = caplog.records
    assert "data.max_prompt_tokens=4: dropped 2 of 4 prompts" in record.getMessage()
    with pytest.raises(InputError, match=r"=2: all 4 prompts of .* the shortest has 3 tokens"):
        load_prompts(source, DataConfig(max_prompt_tokens=2), tokenizer)


def test_a_prompt_that_the_tokenizer_cannot_encode_is_named_by_row(write, tokenizer) -> None:
    source = write({"prompt": "1+2=", "answer": "3"}, {"prompt": "é", "answer": "1"})
    with pytest.raises(InputError, match=r"row 2 \(line 2\): the tokenizer cannot encode"):
        load_prompts(source, DataConfig(), tokenizer)
    silent = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"1": 0}, [])))
    with pytest.raises(InputError, match=r"row 2 \(line 2\): the tokenizer leaves nothing"):
        load_prompts(source, DataConfig(), silent)


GOOD = {"prompt": "1+2=", "answer": "3", "extra": {"truth": "3"}}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": "1+2=", "extra": {"truth": "3"}},
            "set data.answer_column=... to one of prompt, extra.truth",
        ),
        ({"prompt": "1+2="}, "has no column 'answer'; mend the row"),
        ({"answer": "3"}, "has no column 'prompt'; mend the row or set data.prompt_column=..."),
        ({**GOOD, "answer": None}, "has nothing in column 'answer'"),
        ({**GOOD, "prompt": None}, "has nothing in column 'prompt'"),
        ({**GOOD, "prompt": ""}, "column 'prompt' is empty"),
        ({**GOOD, "prompt": []}, "is neither text nor a list"),
        ({**GOOD, "prompt": 3}, "is neither text nor a list of {role, content} messages but 3"),
        ({**GOOD, "prompt": ["1+2="]}, "is neither text nor a list"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "is neither text nor a list"),
    ],
)
def test_a_bad_row_is_named_by_number_before_anything_starts(write, tmp_path, row, says) -> None:
    source = write(GOOD, GOOD, row)
    fine = tmp_path / "fine.jsonl"
    fine.write_text(json.dumps(GOOD))
    for config in (DataConfig(train=source), DataConfig(train=str(fine), eval=source)):
        with pytest.raises(InputError) as caught:
            check_rows(config)
        assert str(caught.value).startswith(f"{source} row 3 (line 3): ")
        assert says in str(caught.value)


def test_good_rows_pass_the_check(write) -> None:
    check_rows(DataConfig(train=write(GOOD, {**GOOD, "prompt": MESSAGES, "answer": 0})))


def test_chat_messages_need_a_chat_template(write, tokenizer, tmp_path) -> None:
    source = write({"prompt": MESSAGES, "answer": "3"})
    with pytest.raises(InputError, match=r"row 1 .*chat messages, and data.chat_template=false"):
        check_rows(DataConfig(train=source, chat_template=False))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="has no chat template"):
        load_prompts(source, DataConfig(), bare)
    bare.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "chats")
    check_rows(DataConfig(train=source), tokenizer=str(tmp_path / "chats"))
    with pytest.raises(InputError, match=r"model.tokenizer=.*bare: has no chat template"):
        check_rows(DataConfig(train=source), tokenizer=str(tmp_path / "bare"))


# The switch of Qwen3's own template: without thinking, answers begin behind an empty block
QWEN3 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)


def test_qwen3_without_thinking_answers_behind_an_empty_think_block(write, caplog) -> None:
    model = Tokenizer(models.WordLevel({chr(code): code for code in range(127)}))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    qwen3 = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=QWEN3)
    source = write({"question": "1+2?", "final_answer": "3"})
    data = DataConfig(prompt_template="boxed", chat_template_kwargs={"enable_thinking": False})
    [prompt] = load_prompts(source, data, qwen3)
    asked = (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.text == f"{asked}<think>\n\n</think>\n\n"
    assert "".join(map(chr, prompt.input_ids)) == prompt.text
    [prompt] = load_prompts(source, replace(data, chat_template_kwargs={}), qwen3)
    assert prompt.text == asked
    assert not caplog.records
    load_prompts(source, replace(data, chat_template_kwargs={"enable_thinkin": False}), qwen3)
    assert (
        "chat_template_kwargs.enable_thinkin: the tokenizer's chat template has no" in caplog.text
    )


def test_messages_that_the_template_refuses_are_named_by_row(write, tokenizer) -> None:
    source = write(
        {"prompt": MESSAGES, "answer": "3"}, {"prompt": chat("user 1", "tool 3"), "answer": "3"}
    )
    with pytest.raises(InputError, match=r"row 2 \(line 2\): .*\(no tools here\)"):
        load_prompts(source, DataConfig(), tokenizer)


def test_rows_that_template_or_tokenizer_refuse_are_left_out_where_bad_rows_are(
    write, tokenizer, caplog
) -> None:
    rows = ["1+2=", "é", chat("user 1", "tool 3"), "4="]
    source = write(*({"prompt": prompt, "answer": "3"} for prompt in rows))
    prompts = load_prompts(source, DataConfig(bad_rows="skip"), tokenizer)
    assert [prompt.index for prompt in prompts] == [0, 3]
    assert "data.bad_rows=skip: 2 of 4 rows are bad and left out: " in caplog.text
    with pytest.raises(InputError, match=r"^2 of 4 rows are bad: .* row 3 .*; .* row 2 "):
        load_prompts(source, DataConfig(), tokenizer)


def test_nothing_is_written_to_the_current_directory(write, tokenizer, tmp_path, monkeypatch):
    source = write(GOOD)
    monkeypatch.chdir(tmp_path)
    config = replace(DataConfig(), train=source)
    check_rows(config)
    load_prompts(source, config, tokenizer)
    assert list(Path().iterdir()) == [Path("rows.jsonl")]


def test_a_saved_tokenizer_loads_and_a_missing_one_is_an_input_error(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded("1+2=")["input_ids"] == tokenizer("1+2=")["input_ids"]
    assert loaded.chat_template == TEMPLATE
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights_only").mkdir()
    (tmp_path / "weights_only" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for name in ("weights_only", "broken"):
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    for name, says in {
        "absent": "there is no such directory",
        "empty": "has no tokenizer_config.json",
        "weights_only": "holds no tokenizer",
        "broken": "transformers finds no tokenizer in it",
    }.items():
        with pytest.raises(InputError, match=says) as caught:
            load_tokenizer(str(tmp_path / name))
        assert str(caught.value).startswith(f"model.tokenizer={tmp_path / name}: ")
