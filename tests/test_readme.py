"""What the documents show must work as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bupo.config import load_config

ROOT = Path(__file__).parents[1]


def test_the_config_in_the_readme_loads(tmp_path: Path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my.yaml").write_text(shown)
    config = load_config(str(tmp_path / "my.yaml"), ["parallel.tp=2", "parallel.pp=2"])
    assert (config.bupo.target_layer, config.bupo.internal_steps) == (6, 30)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "DESIGN.md"])
def test_files_that_a_document_names_exist(document: str):
    text = (ROOT / document).read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`((?:\.ci|conf|tests|tools|constraints|megatron_bupo)/[\w./]*)`", text)
    assert not [path for path in linked + named if not (ROOT / path).exists()]
