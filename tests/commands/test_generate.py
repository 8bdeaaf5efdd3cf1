from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.bed import chain_sums
from megatron_bupo.cli import main, parse
from megatron_bupo.commands.generate import read_generation
from megatron_bupo.commands.score import read_responses
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import read_architecture
from tests.dense import dense_logits, dense_model

ROWS = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "9+9+9=", "answer": "27"}, {"prompt": "7"}]
POLICIES = {
    "full": FULL,
    "layer=1 normed": InternalLayerPolicy(1, True),
    "layer=3 normed": InternalLayerPolicy(3, True),
}


@pytest.fixture
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    model_dir = tiny_model_dir(vocab=16, scale=0.15)  # 4 layers, 256 positions
    if not (model_dir / "tokenizer.json").exists():
        chain_sums.save_tokenizer(model_dir)
    return model_dir


def command(folder: Path, model: Path, *more: str, rows: list[Any] | None = None) -> list[str]:
    rows = ROWS[:2] if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["rollout.max_response_tokens=9", "rollout.responses_per_prompt=2"]
    return ["generate", "--model", str(model), *more, *short]


def from_file(folder: Path, model: Path, *more: str, rows: list[Any] | None = None) -> list[str]:
    return command(folder, model, "--data", str(folder / "rows.jsonl"), *more, rows=rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_policy_answers_each_prompt_and_says_its_own_logprobs(tmp_path: Path, model: Path):
    out = tmp_path / "out.jsonl"
    policies = ["--policy", "layer=1", "--policy", "full", "--policy", "layer=3", "--read-out-norm"]
    sharper = ["rollout.temperature=0.8", f"run_dir={tmp_path}"]
    assert main(from_file(tmp_path, model, *policies, "--out", str(out), *sharper)) == 0
    dense, rows = dense_model(model), rows_of(out)
    asked = [(row["policy"], row["prompt"], row["response"]) for row in rows]
    named = ["layer=1 normed", "full", "layer=3 normed"]
    assert asked == [(p, row["prompt"], i) for p in named for row in ROWS[:2] for i in range(2)]
    for row in rows:
        ids = torch.tensor([row["input_ids"] + row["response_ids"]])
        with torch.no_grad():
            logits = dense_logits(dense, ids, POLICIES[row["policy"]])[0].double() / 0.8
        logprobs = logits.log_softmax(-1)[len(row["input_ids"]) - 1 : -1]
        picked = logprobs[range(len(row["response_ids"])), row["response_ids"]]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert (torch.tensor(row["rollout_logprobs"]) - picked).abs().max() < 1e-5
        assert (torch.tensor(row["entropies"]) - entropy).abs().max() < 1e-5
        assert row["reward"] is None


def test_what_it_writes_can_be_scored(tmp_path: Path, model: Path):
    out = tmp_path / "out.jsonl"
    assert main(command(tmp_path, model, "--prompt", "1+2=", "--out", str(out))) == 0
    given = read_responses(out, read_architecture(str(model)))
    assert [(g.input_ids[: g.prompt_length], g.input_ids[g.prompt_length :]) for g in given] == [
        (tuple(row["input_ids"]), tuple(row["response_ids"])) for row in rows_of(out)
    ]


def test_policies_are_compared_by_their_rewards(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    reward = tmp_path / "reward.py"
    reward.write_text("def length(response, answer):\n    return len(response) / 9\n")
    out, policies = tmp_path / "out.jsonl", ["--policy", "layer=2", "--policy", "full"]
    graded = ["--grade", "--out", str(out), f"reward.function={reward}:length"]
    assert main(from_file(tmp_path, model, *policies, *graded)) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert (
        table[0].split() == "policy reward responses tokens stopped log-prob entropy (nats)".split()
    )
    for line, policy in zip(table[1:], ("layer=2", "full"), strict=True):
        rows = [row for row in rows_of(out) if row["policy"] == policy]
        assert [row["reward"] for row in rows] == [len(row["text"]) / 9 for row in rows]
        means = [fmean(row["reward"] for row in rows[i : i + 2]) for i in (0, 2)]
        logprobs = [x for row in rows for x in row["rollout_logprobs"]]
        mean, error = fmean(means), stdev(means) / math.sqrt(2)
        assert line.split()[:5] == [policy, f"{mean:.3f}", "±", f"{error:.3f}", "4"]
        assert line.split()[7] == f"{fmean(logprobs):.3f}"


def test_responses_are_shown_under_their_prompts(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.jsonl"
    many = [{"prompt": f"{i}+{i}="} for i in range(12)]
    assert main(from_file(tmp_path, model, "--out", str(out), rows=many)) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    expected = ["policy full"]
    for row in rows_of(out)[: 2 * 10]:
        prompt = [f"prompt  {row['prompt']}"] if row["response"] == 0 else []
        tokens, mean = len(row["response_ids"]), fmean(row["rollout_logprobs"])
        facts = f"{row['finish_reason']}, {tokens} token{'s' * (tokens != 1)}, "
        expected += [*prompt, row["text"], f"{facts}mean log-prob {mean:.3f} nats"]
    assert shown == [*expected, "... and 2 prompts more"]


def test_a_recipe_gives_the_settings_and_not_its_layout(tmp_path: Path, model: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {model}}}\nparallel: {{tp: 2, pp: 2}}\nseed: 5\n")
    args = parse(["generate", "--config", str(recipe), "--prompt", "1+2=", "--prompt", "7"])
    args.overrides.append("rollout.max_response_tokens=9")
    generation = read_generation(args)
    assert generation.ready.layout.world == 1
    assert generation.ready.config.seed == 5
    assert generation.policies == (FULL,)
    assert [prompt.text for prompt in generation.prompts] == ["1+2=", "7"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--prompt, --data: there are no prompts; give one of them"),
        (["--prompt", "7", "--data", "ROWS"], "--prompt and --data: both name prompts; "),
        (["--prompt", "7", "--grade"], "--grade with --prompt: a prompt from the command line has"),
        (["--data", "ROWS", "--grade"], "ROWS row 3 (line 3): has no column 'answer'; mend the "),
        (["--data", "ROWS", "--grade", "reward.function=nobody:home"], "reward.function=nobody:"),
        (["--data", "none.jsonl"], "none.jsonl: there is no such file; "),
        (["--prompt", ""], "--prompt '': column 'prompt' is empty; "),
        (["--prompt", "?"], "--prompt '?': the tokenizer leaves nothing of its pro"),
        (["--prompt", "7", "--policy", "layer=4"], "--policy layer=4: is the last layer of a 4-"),
        (["--prompt", "7", "--policy", "full", "--policy", "layer=5"], "--policy layer=5: the mod"),
        (["--prompt", "7", "--policy", "top"], "--policy top: is not a policy; write full, or la"),
        (["--prompt", "7", "--read-out-norm"], "--read-out-norm: the full policy is always read "),
        (["--prompt", "7", "--out", "none/out"], "--out none/out: none is not a directory; "),
        (["--prompt", "7" * 250], "data row 0: a prompt of 250 tokens: the model's context of 256"),
    ],
)
def test_what_is_wrong_is_said_before_anything_loads(
    tmp_path: Path, model: Path, more: list[str], message: str
):
    rows = str(tmp_path / "rows.jsonl")
    more = [word.replace("ROWS", rows) for word in more]
    with pytest.raises(InputError) as error:
        read_generation(parse(command(tmp_path, model, *more, rows=ROWS)))
    assert str(error.value).startswith(message.replace("ROWS", rows))


def test_without_a_grade_rows_need_no_answer(tmp_path: Path, model: Path):
    generation = read_generation(parse(from_file(tmp_path, model, rows=ROWS)))
    assert [prompt.answer for prompt in generation.prompts] == ["", "", ""]
    with pytest.raises(InputError, match=r"has no column 'answer'"):
        read_generation(parse(from_file(tmp_path, model, "--grade", rows=ROWS)))
