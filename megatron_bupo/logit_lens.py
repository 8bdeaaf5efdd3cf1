"""Which tokens would each layer have said, in a few responses? `OUT/lens.json`, for the report.

::

    {"top": 5, "read_outs": ["raw", "norm"],
     "texts": {"1012": " sum", ...},                     of every id below
     "responses": [{"prompt": "...", "ids": [...],       of at most so many response tokens, and
                    "pieces": [...], "more": 0,          how many more there were
                    "raw": {"ids": [...],                [tokens][layers][top]
                            "probs": [...],
                            "rank": [...], "entropy": [...], "kl": [...]},   [tokens][layers]
                    "norm": {...}}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bupo import collective
from megatron_bupo.analysis.present import LENS, read_lens
from megatron_bupo.commands.analyze import Analysis
from megatron_bupo.commands.score import GivenResponse
from megatron_bupo.config import expand
from megatron_bupo.data.token_texts import Decode, decoder_of, pieces, token_texts
from megatron_bupo.durable import replace_text
from megatron_bupo.mcore.logit_lens import Lens, LensReader
from megatron_bupo.score import as_batch

TOP = 5  # tokens of a layer
TOKENS = 128  # of a response, at most: what the page has to hold
_DIGITS = 4  # significant


def keep_lens(
    analysis: Analysis, responses: Sequence[GivenResponse], reader: Callable[[], LensReader]
) -> None:
    """Write what is to be kept of the first responses, unless it is there. Collective."""
    path = analysis.out / LENS
    asked = min(analysis.lens_responses, len(responses))
    there = [_count(path)] if collective.is_first() else []
    if collective.gather(there) == [asked]:
        return
    shown = [
        GivenResponse(r.input_ids[: r.prompt_length + TOKENS], r.prompt_length)
        for r in responses[:asked]
    ]
    top = min(TOP, analysis.architecture.vocab_size)
    # One at a time: the prompts may be long
    found = [reader().lens(as_batch([response]), top=top) for response in shown]
    if collective.is_first():
        content = _content(shown, responses, found, decoder(analysis), top)
        replace_text(path, json.dumps(content, allow_nan=False))


def _count(path: Path) -> int | None:
    content = read_lens(path.parent)
    return None if content is None else len(content["responses"])


def decoder(analysis: Analysis) -> Decode:
    """What makes text of ids, special tokens too; where there is no tokenizer, their numbers."""
    model = analysis.ready.config.model
    try:
        return decoder_of(Path(expand(model.tokenizer or model.path)))
    except Exception:  # the tokenizers library raises bare Exceptions
        return lambda ids: "".join(f"#{i} " for i in ids)


def _content(
    shown: Sequence[GivenResponse],
    responses: Sequence[GivenResponse],
    found: Sequence[Mapping[str, Lens]],
    decode: Decode,
    top: int,
) -> dict[str, Any]:
    ids = {i for response in shown for i in response.input_ids[response.prompt_length :]}
    ids |= {
        int(i) for of in found for lens in of.values() for i in lens.token_ids.unique().tolist()
    }
    return {
        "top": top,
        "read_outs": list(found[0]) if found else [],
        "texts": {str(i): decode([i]) for i in sorted(ids)},
        "responses": [
            {
                "prompt": decode(response.input_ids[: response.prompt_length]),
                "ids": response.input_ids[response.prompt_length :],
                "pieces": pieces(
                    *token_texts(response.input_ids[response.prompt_length :], decode)
                ),
                "more": len(whole.input_ids) - len(response.input_ids),
                **{name: _columns(lens) for name, lens in of.items()},
            }
            for response, whole, of in zip(shown, responses, found, strict=False)
        ],
    }


def _columns(lens: Lens) -> dict[str, Any]:
    return {
        "ids": lens.token_ids.transpose(0, 1).tolist(),
        "probs": _short(lens.probs),
        "rank": lens.rank.t().tolist(),
        "entropy": _short(lens.entropy),
        "kl": _short(lens.kl_to_full),
    }


def _short(values: Tensor) -> Any:
    """`[layers, tokens, ...]` as lists `[tokens][layers]...` of short numbers."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(inner) for inner in value]
        return float(f"{value:.{_DIGITS}g}")

    return rounded(values.transpose(0, 1).tolist())
