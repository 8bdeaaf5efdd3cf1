from __future__ import annotations

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.errors import InputError

TWO = "data.sources=[{path: a.jsonl}, {path: b.jsonl, weight: 2}]"
BOXED, OCTO = "data.prompt_template=boxed", "data.prompt_template=octothinker"
OWN = "data.prompt_template='Q: {question}'"


def config_of(*settings: str):
    return load_config(None, ["model.path=model", *settings])


@pytest.mark.parametrize(
    "settings",
    [
        (TWO,),
        ("data.train=a.jsonl", BOXED, "data.chat_template_kwargs.enable_thinking=false"),
        ("data.train=a.jsonl", BOXED, "data.chat_template=true"),
        ("data.train=a.jsonl", OCTO, "data.chat_template=false"),
        ("data.train=a.jsonl", OWN, "data.chat_template=true", "data.system_prompt=Add."),
    ],
)
def test_settings_that_say_one_thing_pass(settings: tuple[str, ...]) -> None:
    check(config_of(*settings), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "data.train: has no value; "),
        (("data.train=a.jsonl", TWO), "data.train=a.jsonl: and data.sources both say what to"),
        (("data.sources=[{weight: 2}]",), "data.sources[0].path: has no value"),
        (("data.sources=[{path: a, weight: 0}]",), "data.sources[0].weight=0.0: is out of range"),
        (("data.sources=[{path: a, weight: .nan}]",), "data.sources[0].weight=nan: is out of"),
        (
            ("data.sources=[{path: a}, {path: a}]",),
            "data.sources[1].path=a: is data.sources[0] too; add their weights up",
        ),
        (
            ("data.sources=[{path: a, name: x}, {path: b, name: x}]",),
            "data.sources[1].name=x: is another source's name",
        ),
        (("data.sources=[{path: a, name: x/y}]",), "data.sources[0].name=x/y: cannot be a part"),
        (
            ("data.train=a", "data.prompt_template=octothinkr"),
            "data.prompt_template=octothinkr: is neither boxed nor octothinker nor a text with",
        ),
        (("data.train=a", BOXED, "data.system_prompt=x"), "begins with a system message of its"),
        (("data.train=a", BOXED, "data.chat_template=false"), "wants plain text; unset one"),
        (("data.train=a", OCTO, "data.system_prompt=x"), "is all there is, and data.system_"),
        (("data.train=a", OCTO, "data.chat_template=true"), "data.chat_template=true wants chat"),
        (
            ("data.train=a", OCTO, "data.chat_template_kwargs.enable_thinking=false"),
            "data.chat_template_kwargs wants chat messages",
        ),
        (("data.train=a", OWN, "data.system_prompt=x"), "with data.chat_template=true, the temp"),
        (
            ("data.train=a", "data.chat_template=false", "data.chat_template_kwargs.x=1"),
            "data.chat_template=false: leaves data.chat_template_kwargs without a reader",
        ),
    ],
)
def test_settings_that_say_two_things_or_none_are_refused(settings, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check(config_of(*settings), None)
    assert message in str(caught.value)
