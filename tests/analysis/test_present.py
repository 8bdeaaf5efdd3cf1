"""What people get of an analysis: drawn from its directory alone, with its own numbers inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bupo.algorithm.entropy_flow import PolicyReadings, Readings
from megatron_bupo.analysis.figures import entropy_flow, layer_ticks
from megatron_bupo.analysis.moments import Moments, pooled
from megatron_bupo.analysis.present import LENS, present
from megatron_bupo.analysis.report import write_report
from megatron_bupo.analysis.results import results, write_results
from megatron_bupo.analysis.stages import advise, as_record
from megatron_bupo.errors import InputError

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028 & <!--DATA-->"


def analysis(out: Path, *, layers: int, responses: int, model: str = "tiny") -> dict[str, Any]:
    """Write one of random readings into `out`; its content."""
    lengths = list(range(2, 2 + responses))

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, sum(lengths))

    def policies() -> PolicyReadings:
        return PolicyReadings(*[], **{n: random(layers) for n in PolicyReadings.__annotations__})

    columns = {n: random(layers) for n in Readings.__annotations__ if n.startswith(("att", "ffn"))}
    readings = Readings(
        embedding_entropy=random(),
        full_entropy=random(),
        full_logprob=-random(),
        layer=policies(),
        normed_layer=policies(),
        **columns,
    )
    values = {k: v.numpy() for k, v in (readings.of_layers() | readings.of_model()).items()}
    moments = Moments.of(values, lengths)
    about = {"model": model, **as_record(*advise(moments, confidence=0.95))}
    about["data"] = {"responses": responses, "tokens": sum(lengths), "source": "x", "sampled": True}
    content = results(
        pooled(moments, confidence=0.95), read_out="raw", confidence=0.95, about=about
    )
    write_results(out, content)
    return content


def embedded(page: Path, name: str) -> Any:
    found = re.findall(
        rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text()
    )
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_the_numbers_of_the_analysis_and_nothing_from_elsewhere(tmp_path: Path):
    content = analysis(tmp_path, layers=8, responses=4)
    page, *figures = present(tmp_path)
    assert (
        embedded(page, "analysis")
        == content
        == json.loads((tmp_path / "analysis.json").read_text())
    )
    assert embedded(page, "lens") is None
    assert not re.findall(
        r"""(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page.read_text()
    )
    for png in figures:
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_hostile_texts_stay_text(tmp_path: Path):
    content = analysis(tmp_path, layers=2, responses=2, model=HOSTILE)
    lens = {"top": 1, "read_outs": ["raw"], "texts": {"1": HOSTILE}, "responses": []}
    page = write_report(tmp_path, content, lens)
    assert (embedded(page, "lens"), embedded(page, "analysis")) == (lens, content)
    text = page.read_text()
    assert text.count("</script>") == 3  # of two pieces of data and of the page
    assert "<img" not in text
    assert text.count("<!--") == 0


def test_one_layer_one_response_and_any_name_can_be_drawn(tmp_path: Path):
    analysis(tmp_path, layers=1, responses=1, model=HOSTILE + r"$\frac")
    (tmp_path / LENS).write_text("damaged")
    assert all(path.stat().st_size for path in present(tmp_path))


def test_the_flow_goes_from_each_layers_input_to_its_output(tmp_path: Path):
    content = analysis(tmp_path, layers=3, responses=2)
    flow = entropy_flow(content)
    assert flow[0, 0] == content["embedding"]["entropy_nats"]
    assert np.array_equal(flow[1:, 0], flow[:-1, 3])
    for layer, row in zip(content["layers"], flow.tolist(), strict=True):
        names = ("attention_entropy_nats", "ffn_entropy_nats", "entropy_nats")
        assert row[1:] == [layer[name] for name in names]


def test_layers_are_numbered_as_in_the_paper():
    assert layer_ticks(36) == [1, 5, 10, 15, 20, 25, 30, 36]
    assert layer_ticks(28) == [1, 5, 10, 15, 20, 25, 28]
    assert layer_ticks(6) == [1, 2, 3, 4, 5, 6]
    assert layer_ticks(1) == [1]


@pytest.mark.parametrize("damaged", [None, "{", "[]", '{"layers": []}', '{"layers": 3}'])
def test_what_is_no_analysis_cannot_be_drawn(tmp_path: Path, damaged: str | None):
    if damaged is not None:
        (tmp_path / "analysis.json").write_text(damaged)
    with pytest.raises(InputError, match="analysis"):
        present(tmp_path)
