from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron_bupo.cli import main
from megatron_bupo.record.rollout_files import read_rollouts, step_file
from tests.record.dumps import dump

WORDS = ["<pad>", "let", "me", "check", "</script><script>alert(1)</script>", "$"]


@pytest.fixture
def dumped(tmp_path: Path) -> Path:
    """A run directory with rollouts of steps 3 and 12, whose tokens are words."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    vocab |= {f"w{i}": i for i in range(len(WORDS), 16)}
    Tokenizer(models.WordLevel(vocab, unk_token="<pad>")).save(str(tmp_path / "tokenizer.json"))
    run_dir = dump(tmp_path / "run", 3, 12)
    (run_dir / "config.yaml").write_text(f"model:\n  path: {tmp_path}\n  tokenizer: null\n")
    return run_dir


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["rollouts", "show", *map(str, argv)]) == 0
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(r"\s+7\s", line)]


def test_a_table_has_a_row_for_each_rollout_of_the_last_step(dumped: Path, capsys):
    text = shown(capsys, dumped)
    assert text.startswith(
        "step 12  policy trained: internal layer 6  4 rollouts of 2 prompts  reward 0.438  "
    )
    server, failed = "10.0.0.5:30000", ["took", "longer", "than", "5", "s"]
    assert rows(text) == [
        ["7", "0", "1", "+0.500", "3", "stop", "12"],
        ["7", "1", "0.25", "-0.500", "2", "stop", "12"],
        ["7", "0", "0", "-1.000", "3", "abort", "11", "12", server, "2", *failed],
        ["7", "1", "0.5", "+1.000", "1", "stop", "12"],
    ]
    assert "\x1b" not in text  # no terminal: no colours
    assert shown(capsys, dumped / "rollouts") == text
    assert len(rows(shown(capsys, dumped, "--step", "all"))) == 8
    assert "... and 3 more: --limit 4" in shown(capsys, dumped, "--limit", 1)


def test_the_worst_and_the_best_are_told_in_full(dumped: Path, capsys):
    worst = shown(capsys, dumped, "--worst", 2)
    assert [row[2] for row in rows(worst)] == ["0", "0.25"]
    assert "prompt 7, response 0: reward 0, answer 13\n4+9=\nlet check check\n" in worst
    assert [row[2] for row in rows(shown(capsys, dumped, "--best", 1))] == ["1"]


def test_a_page_holds_the_numbers_and_needs_nothing_else(dumped: Path, tmp_path: Path, capsys):
    grams = tmp_path / "grams.txt"
    grams.write_text("# by hand\nLet Check\n")
    page = tmp_path / "page.html"
    shown(capsys, dumped, "--step", "3,12", "--html", page, "--strategic-grams", grams)
    html = page.read_text(encoding="utf-8")
    scripts = re.findall(r"<script( [^>]*)?>(.*?)</script>", html, re.DOTALL)
    assert [about for about, _ in scripts] == [
        *(f' type="application/json" data-step="{step}"' for step in (3, 12)),
        "",
    ]
    outside = re.findall(r"(?:src|href|url|@import)\s*[=(]", html)
    assert outside == []
    for step, (_, text) in zip((3, 12), scripts, strict=False):
        data = json.loads(text)
        groups = data["groups"]
        rollouts = read_rollouts(step_file(dumped, step))
        assert (data["step"], data["policy"]) == (step, "internal layer 6")
        told = [rollout for group in groups for rollout in group["rollouts"]]
        assert [len(group["rollouts"]) for group in groups] == [2, 2]
        for one, other in zip(told, rollouts, strict=True):
            assert one["reward"] == other.grade.reward
            assert one["ids"] == [*other.response_ids]
            assert one["pieces"][:1] == [WORDS[other.response_ids[0]]]
            for name, values in (
                ("sampled", other.rollout_logprobs),
                ("old", other.old_logprobs),
                ("advantages", other.advantages),
            ):
                column = one[name] if isinstance(one[name], list) else [one[name]] * len(one["ids"])
                assert column == pytest.approx(values, rel=1e-4)
    assert [rollout["planning"] for rollout in told] == [[1, 1, 0], [0, 0], [1, 1, 0], [0]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN/none"], "RUN/none: there is no such directory; name a run_dir"),
        (["RUN/.."], "RUN/..: holds no rollouts; train with debug.dump_rollouts=true, or with"),
        (["RUN", "--step", "4"], "--step 4: was not dumped; 2 steps are there, 3 to 12"),
        (["RUN", "--step", "3,x"], "--step 3,x: names no steps; write last, all, or e.g. 0,12"),
        (["RUN", "--prompt", "8"], "--prompt 8: is not among the prompts of step 12"),
        (["RUN", "--best", "0"], "command line: argument --best: 0 is not a number from 1 up"),
        (["RUN", "--best", "1", "--html", "x"], "command line: argument --html: not allowed with"),
        (["RUN", "--html", "RUN/no/x"], "--html RUN/no/x: No such file or directory; choose"),
        (["RUN", "--tokenizer", "RUN", "--best", "1"], "--tokenizer RUN: RUN has no tokenizer"),
        (["RUN", "--strategic-grams", "RUN/none"], "RUN/none: cannot be read (No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line(dumped: Path, capsys, argv: list[str], message: str):
    argv = [word.replace("RUN", str(dumped)) for word in argv]
    assert main(["rollouts", "show", *argv]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: " + message.replace("RUN", str(dumped)))
    assert told.count("\n") == 1


def test_a_broken_file_and_a_run_without_its_tokenizer_are_named(dumped: Path, capsys):
    file = step_file(dumped, 12)
    file.write_text(file.read_text()[:-30])
    assert main(["rollouts", "show", str(dumped)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: line 4: is no rollout (")
    (dumped / "config.yaml").unlink()
    assert main(["rollouts", "show", str(dumped), "--step", "3", "--best", "1"]) == 2
    assert capsys.readouterr().err == (
        f"error: {dumped}/config.yaml: does not say which tokenizer the run had; "
        "give --tokenizer DIR\n"
    )
