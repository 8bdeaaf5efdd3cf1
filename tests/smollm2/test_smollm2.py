"""SmolLM2-135M-Instruct, a model that people use: made offline, converted, computed, and, by
`make test-wide`, trained.

It has 9 heads in 3 groups, so for TP2 the tests take the form with a fourth group of zeros, which
computes the same, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bupo.errors import InputError
from tests.runs import Done, metrics, run
from tools.make_smollm2 import INSTALL, gguf_file, main, make_smollm2, read_gguf

pytestmark = [pytest.mark.real, pytest.mark.slow]

LAYER = 20  # of 30
QUESTIONS = {
    "What is 3 + 4?": "7",
    "What is 12 - 5?": "7",
    "What is 6 times 7?": "42",
    "How many letters does the word tree have?": "4",
}
REWARD = """
def reward(response, answer):
    return float(answer in response) - len(response) / 1000
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gigabytes, which pytest would keep for three sessions."""
    try:
        read_gguf(gguf_file())
    except InputError as error:
        pytest.skip(str(error))
    made = tmp_path_factory.mktemp("smollm2")
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make_smollm2(folder / "hf")


@pytest.fixture(scope="module")
def padded(folder: Path) -> Path:
    return make_smollm2(folder / "padded", kv_heads=4)


@torch.no_grad()
def logits(model_dir: Path, text: str) -> Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model(**tokenizer(text, return_tensors="pt")).logits[0]


def convert(*words: object) -> Done:
    done = run("convert", *words, timeout_s=200)
    assert done.code == 0, done.err
    return done


@pytest.mark.wide
def test_it_speaks_and_the_padded_form_says_the_same(model: Path, padded: Path):
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    ours = logits(model, text + "The capital of France is")
    assert tokenizer.decode(ours[-1].argmax()) == " Paris"
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert torch.equal(logits(padded, text + "The capital of France is"), ours)


def test_tp2_pp2_computes_what_transformers_does_and_it_comes_back_bit_equal(
    padded: Path, folder: Path
):
    """Within 1e-5 of a position's largest log-prob, which is 39 nats: fp32 in transformers itself
    is 9e-5 nats from fp64.
    """
    layout = ["parallel.tp=2", "parallel.pp=2"]
    convert("hf-to-megatron", "--hf", padded, "--out", folder / "megatron", *layout)
    report = folder / "report.json"
    asked = ["--sequences", 2, "--json", report]
    convert("verify", padded, folder / "megatron", *layout, *asked)
    found = json.loads(report.read_text())
    assert found["same"]
    assert found["tensors"] == 272
    assert found["computed"]["largest_relative"] < 1e-5
    assert found["computed"]["largest_nats"] < 2e-4
    convert("megatron-to-hf", "--megatron", folder / "megatron", "--out", folder / "back")
    for file in sorted(path.name for path in padded.iterdir()):
        assert (folder / "back" / file).read_bytes() == (padded / file).read_bytes(), file


@pytest.mark.wide
def test_bupo_trains_it_from_below(model: Path, folder: Path):
    """A step of the internal policy of layer 20, then one of the full policy."""
    rows = [
        {"prompt": [{"role": "user", "content": question}], "answer": answer}
        for question, answer in QUESTIONS.items()
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    run_dir = folder / "run"
    done = run(
        "train",
        f"run_dir={run_dir}",
        f"model.path={model}",
        f"data.train={folder / 'train.jsonl'}",
        "data.max_prompt_tokens=64",
        f"reward.function={folder / 'reward.py'}:reward",
        "steps=2",
        f"bupo.target_layer={LAYER}",
        "bupo.internal_steps=1",
        "parallel.pp=2",
        "rollout.prompts_per_step=2",
        "rollout.responses_per_prompt=4",
        "rollout.max_response_tokens=16",
        "algorithm.minibatches=1",
        "trainer.microbatch_size=4",
        "optimizer.lr=1e-5",
        "checkpoint.every=1",
        "checkpoint.export_hf=false",
        "logging.tensorboard=false",
        timeout_s=200,
    )
    assert done.code == 0, done.err
    steps = metrics(run_dir)
    assert [step["policy"] for step in steps] == [f"internal layer {LAYER}", "full"]
    numbers = [value for step in steps for value in step.values() if isinstance(value, float)]
    assert len(numbers) > 20
    assert torch.tensor(numbers).isfinite().all()
    assert steps[0]["update/grad_norm"] > 0
    internal = run_dir / "checkpoints" / "step_000001"
    convert("megatron-to-hf", "--megatron", internal, "--out", folder / "internal")
    before, after = (load_file(f / "model.safetensors") for f in (model, folder / "internal"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    above = {name for name in before if "layers." in name and int(name.split(".")[2]) >= LAYER} | {
        "model.norm.weight"
    }
    assert moved
    assert not moved & above
    assert {int(name.split(".")[2]) for name in moved if "layers." in name} == set(range(LAYER))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--kv-heads", "2"], "--kv-heads 2"), ([], "exists already")],
)
def test_what_cannot_be_made_is_one_line(
    words: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    out = folder / "new" if words else folder
    assert main(["--out", str(out), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert named in err


def test_without_its_package_the_tool_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.path", [])  # where importlib.metadata looks
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert INSTALL in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
