"""What `datasets` reads: directories here, and hub ids without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.data.rows import read_rows
from megatron_bupo.errors import InputError

ROWS = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(3)]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", True)


def answers(source: str) -> list[str]:
    return [row.values["answer"] for row in read_rows(source)]


def test_what_save_to_disk_wrote_is_read_by_its_directory_and_split(tmp_path) -> None:
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "alone")
    DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(tmp_path / "both")
    DatasetDict({"test": whole}).save_to_disk(tmp_path / "test.only")
    for name in ("alone", "both", "test.only", "both:train"):
        assert answers(f"{tmp_path}/{name}") == ["1", "2", "3"]
    assert answers(f"{tmp_path}/both:test") == ["3"]
    assert next(iter(read_rows(f"{tmp_path}/both:test"))).where == f"{tmp_path}/both:test row 1"
    for source, says in {
        "both:dev": "has the splits train, test",
        "alone:x": "has no splits",
    }.items():
        with pytest.raises(InputError, match=says):
            answers(f"{tmp_path}/{source}")


def test_a_directory_of_parquet_files_is_a_data_set_as_a_clone_of_the_hub_has_it(tmp_path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    for name, rows in {
        "train-00000-of-00002": ROWS[:2],
        "train-00001-of-00002": ROWS[2:],
        "test-00000-of-00001": ROWS[:1],
    }.items():
        parquet.write_table(pa.Table.from_pylist(rows), data / f"{name}.parquet")
    assert answers(str(tmp_path / "clone")) == ["1", "2", "3"]
    assert answers(f"{tmp_path}/clone:test") == ["1"]
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"bare: datasets cannot load it"):
        answers(str(tmp_path / "bare"))


def test_a_hub_id_without_a_network_says_what_else_would_do(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("nobody/nothing", "nobody/nothing:main/test", "nothing:test"):
        with pytest.raises(InputError) as caught:
            answers(source)
        assert str(caught.value).startswith(f"{source}: datasets cannot load it (")
        assert str(caught.value).endswith("a directory that datasets.save_to_disk wrote elsewhere")
