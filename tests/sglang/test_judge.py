from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_bupo.rollout.processes import ServerProcess
from tests.sglang.real import answers, config_of, until
from tests.small_tokenizers import byte_level
from tests.test_classify_errors import classify, dump, written

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_a_real_server_is_asked_and_what_a_random_model_says_is_unclear(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_dir(vocab=512), model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["4+9=13"]), chat_template=CHAT)
    tokenizer.save_pretrained(model)
    server = ServerProcess(0, config_of(model, "sglang.skip_tokenizer_init=false"), tmp_path)
    server.start()
    try:
        until(lambda: answers(server), 480)
        run = dump(tmp_path / "run", {0: ["13", "4+9 is 14"], 3: ["x" * 9000]})
        options = ("--max-tokens=8", "--timeout-s=60", "--max-chars=12000")
        address = f"{server.address}/v1"
        assert classify(address, out, run, *options) == 1
        (answered, refused), _ = written(out)
        assert (answered["unclear"], answered["unanswered"]) == (2, 0)
        assert refused["unanswered"] == 1  # it is longer than the judge's context
        assert (
            classify(address, out, run, "--max-tokens=8", "--timeout-s=60", "--max-chars=99") == 0
        )
    finally:
        server.stop()
