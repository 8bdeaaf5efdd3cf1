"""The example report of SmolLM2: its page, figures and numbers are of one analysis, and its README
tells no others.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_bupo.analysis.present import LENS, present
from tests.runs import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "smollm2"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `analyze --out` has drawn again, from the numbers alone."""
    out = tmp_path_factory.mktemp("smollm2")
    shutil.copy(EXAMPLE / "analysis.json", out)
    page = (EXAMPLE / "report.html").read_text(encoding="utf-8")
    [lens] = re.findall(r'<script type="application/json" id="lens">(.*?)</script>', page)
    (out / LENS).write_text(lens, encoding="utf-8")
    present(out)
    return out


def test_the_page_is_what_the_numbers_are_drawn_as(drawn: Path):
    assert (drawn / "report.html").read_bytes() == (EXAMPLE / "report.html").read_bytes()


def test_the_figures_are_what_the_numbers_are_drawn_as(drawn: Path):
    shipped = sorted(path.name for path in (EXAMPLE / "figures").iterdir())
    assert shipped == sorted(path.name for path in (drawn / "figures").glob("*.png"))
    for name in shipped:
        with (
            Image.open(EXAMPLE / "figures" / name) as was,
            Image.open(drawn / "figures" / name) as now,
        ):
            if was.info["Software"] == now.info["Software"]:  # else another matplotlib drew it
                assert was.tobytes() == now.tobytes()


def test_the_readme_tells_the_numbers_of_the_analysis():
    analysis = json.loads((EXAMPLE / "analysis.json").read_text())
    text = " ".join((EXAMPLE / "README.md").read_text(encoding="utf-8").split())
    layers, advice = analysis["layers"], analysis["recommendation"]
    questions = (EXAMPLE / "questions.jsonl").read_text().splitlines()
    assert analysis["data"]["responses"] == len(questions) == 50
    assert f"all {analysis['data']['tokens']:,} tokens" in text
    assert advice["share_of_draws"] == {str(advice["target_layer"]): 1.0}
    assert f"recommends layer {advice['target_layer']} of {len(layers)} as a fallback" in text
    assert advice["rule"] == "last internal layer"
    changes = [layer["ffn_entropy_change_nats"] for layer in layers]
    least, most = changes.index(max(changes)), changes.index(min(changes))
    assert f"by {-changes[least]:.1f} (layer {least + 1}) to {-changes[most]:.1f} nats" in text
    assert f"nats (layer {most + 1})" in text
    raised = [layer["layer"] for layer in layers if layer["attention_entropy_change_nats"] > 0]
    assert len(raised) == 1
    assert f"every attention but that of layer {raised[0]}" in text
    chosen = layers[advice["target_layer"] - 1]
    assert f"at {chosen['top1_agreement']:.1%} of tokens".replace("%", " %") in text
    assert f"to {chosen['normed_top1_agreement']:.0%} at layer".replace("%", " %") in text
    inputs = [layer["ffn_input_entropy_nats"] for layer in layers]
    assert f"{min(inputs):.1f} to {max(inputs):.1f} nats in all layers" in text
