"""Keys are named in what a launch writes, and not held by it."""

from __future__ import annotations

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.launch.secrets import refuse_in_overrides


@pytest.mark.parametrize(
    ("override", "key", "name"),
    [
        ("servers.api_key=sk-1", "servers.api_key", "SGLANG_API_KEY"),
        ("servers={api_key: sk-1}", "servers.api_key", "SGLANG_API_KEY"),
        ("servers.env={HF_TOKEN: sk-1}", "servers.env.HF_TOKEN", "HF_TOKEN"),
        ("servers.env.AWS_SECRET_ACCESS_KEY=sk-1", "servers.env.AWS_SECRET_ACCESS_KEY", "AWS_"),
    ],
)
def test_a_key_is_refused_and_not_repeated(override: str, key: str, name: str):
    with pytest.raises(InputError) as caught:
        refuse_in_overrides(["steps=2", override])
    text = str(caught.value)
    assert text.startswith(f"{key}: would be written to files of the launch; export {name}")
    assert f"'{key}=${{oc.env:{name}" in text
    assert "sk-1" not in text


def test_its_name_is_not():
    refuse_in_overrides(
        [
            "servers.api_key=${oc.env:SGLANG_API_KEY}",
            "servers.env={HF_TOKEN: null, TOKENIZERS_PARALLELISM: false}",
            "data.max_prompt_tokens=16",
            "servers.addresses=[]",
        ]
    )
    refuse_in_overrides(["servers.api_key=null"])
    refuse_in_overrides([])
