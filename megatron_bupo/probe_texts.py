"""What a probe looks at: texts that stay the same, and the prompts that they answer.

::

    run_dir/probe/responses.jsonl    what the model answered before training, as `generate` writes
                                     it; where `probe.responses` names a file, that instead
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megatron_bupo.commands.score import GivenResponse, read_responses
from megatron_bupo.config import Config, expand
from megatron_bupo.config.probe_rules import max_response_tokens
from megatron_bupo.config.rollout_rules import positions
from megatron_bupo.durable import whole_lines
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.types import Prompt

FOLDER, SAMPLED = "probe", "responses.jsonl"


@dataclass(frozen=True)
class ProbeTexts:
    """Texts to read, none of them without a response, and prompts to answer."""

    responses: tuple[GivenResponse, ...]
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, rows: Sequence[GivenResponse], numbers: Iterable[int]) -> ProbeTexts:
        """From rows of a file, whose prompts have `numbers`; what was answered with nothing is
        still a prompt.
        """
        asked = (row.input_ids[: row.prompt_length] for row in rows)
        return cls(
            tuple(row for row in rows if len(row.input_ids) > row.prompt_length),
            tuple(Prompt(i, ids, "", "") for i, ids in zip(numbers, asked, strict=False)),
        )


def given_texts(config: Config, architecture: DecoderSizes) -> ProbeTexts | None:
    """Those of `probe.responses`, which must all have a response and leave room for another one;
    None: there is no such file.
    """
    if config.probe.responses is None:
        return None
    path = Path(expand(config.probe.responses))
    texts = ProbeTexts.of(rows := read_responses(path, architecture), count())
    where = f"probe.responses={config.probe.responses}"
    if len(texts.responses) < len(rows):
        reason = f"{len(rows) - len(texts.responses)} of its {len(rows)} responses are empty"
        raise InputError(where, reason, "leave those rows out")
    longest, most = max(len(p.input_ids) for p in texts.prompts), max_response_tokens(config)
    room, whose = positions(config, architecture)
    if longest + most > room and config.debug.replay is None:
        reason = f"a prompt of {longest} tokens and an answer of {most} exceed {whose}"
        raise InputError(where, reason, f"set probe.max_response_tokens={max(room - longest, 1)}")
    return texts


def sampled_texts(run_dir: Path, architecture: DecoderSizes) -> ProbeTexts | None:
    """Those that an earlier start of the run has sampled; None: none are there."""
    path = run_dir / FOLDER / SAMPLED
    if not path.exists():
        return None
    rows = read_responses(path, architecture)
    numbers = [json.loads(line).get("prompt_index", 0) for line in whole_lines(path) if line]
    return ProbeTexts.of(rows, numbers)  # which their noise hangs on
