from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.data.gram_files import read_clusters, read_grams
from megatron_bupo.errors import InputError


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_holds_a_gram_a_line(tmp_path: Path):
    path = written(tmp_path, "grams.txt", "\ufeff# mine\nlet me check\n\n wait, so  # often\n")
    assert read_grams(path) == ["let me check", "wait, so"]


def test_a_yaml_file_holds_grams_with_or_without_what_is_known_of_them(tmp_path: Path):
    rows = "source: me\ngrams:\n- {gram: let me check, solutions: 3}\n- we can try\n"
    path = written(tmp_path, "grams.yaml", rows)
    assert read_grams(path) == ["let me check", "we can try"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "# nothing\n", "holds no grams"),
        ("a.yaml", "", "has no list of grams"),
        ("a.yaml", "grams: []", "holds no grams"),
        ("a.yaml", "grams: {let: me}", "has no list of grams"),
        ("a.yaml", "grams: [let me, 7]", "gram 2: 7 is not text"),
        ("a.yaml", "grams: [{grm: let me}]", "gram 1: None is not text"),
        ("a.yaml", "grams: [{gram: let me, cluster: [1]}]", r"gram 1: cluster \[1\] is no"),
        ("a.yaml", "grams: [", "is not valid YAML"),
    ],
)
def test_what_is_no_list_of_grams_is_refused(tmp_path: Path, name: str, text: str, told: str):
    with pytest.raises(InputError, match=told):
        read_grams(written(tmp_path, name, text))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "b.txt", "."):
        with pytest.raises(InputError, match="cannot be read"):
            read_grams(tmp_path / name)


def test_clusters_are_those_of_the_grams_that_have_one(tmp_path: Path):
    rows = "- {gram: let me, cluster: 3}\n- we can\n- {gram: wait, cluster: doubt}\n"
    path = written(tmp_path, "grams.yaml", rows)
    assert read_clusters(path) == {"let me": 3, "wait": "doubt"}
    assert read_clusters(written(tmp_path, "grams.txt", "let me\n")) == {}
