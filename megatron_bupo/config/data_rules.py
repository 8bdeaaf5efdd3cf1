"""Do the settings of `data` say one thing each? No files are read here."""

from __future__ import annotations

import difflib
import math
import re

from megatron_bupo.config.schema import Config, DataConfig
from megatron_bupo.errors import InputError

TEMPLATES = ("boxed", "octothinker")  # see data/questions.py
SLOT = "{question}"
_LETTERS = "letters, digits and . _ -"


def check_data(config: Config, *, training: bool) -> None:
    """All rules; where nothing is trained, there need be no training data."""
    data = config.data
    if data.train is not None and data.sources:
        reason = "and data.sources both say what to train on"
        raise InputError(f"data.train={data.train}", reason, "keep one of them")
    if training and data.train is None and not data.sources:
        raise InputError(
            "data.train", "has no value", "set it in the YAML file or as data.train=..."
        )
    _sources_can_be_mixed(data)
    _template_is_one(data)
    if data.chat_template is False and data.chat_template_kwargs:
        reason = "leaves data.chat_template_kwargs without a reader"
        raise InputError("data.chat_template=false", reason, "unset one of them")


def _sources_can_be_mixed(data: DataConfig) -> None:
    for i, source in enumerate(data.sources):
        where = f"data.sources[{i}]"
        if source.path == "???":
            raise InputError(f"{where}.path", "has no value", "name a file or a hub id")
        if not (source.weight > 0 and math.isfinite(source.weight)):
            shown = f"{where}.weight={source.weight}"
            raise InputError(shown, "is out of range", "must be greater than 0")
        before = [other.path for other in data.sources[:i]]
        if source.path in before:
            reason = f"is data.sources[{before.index(source.path)}] too"
            raise InputError(f"{where}.path={source.path}", reason, "add their weights up")
        if source.name is not None:
            shown = f"{where}.name={source.name}"
            if not re.fullmatch(r"[\w.-]+", source.name):
                raise InputError(shown, "cannot be a part of a metric's name", f"use {_LETTERS}")
            if source.name in [other.name for other in data.sources[:i]]:
                raise InputError(shown, "is another source's name", "choose another")


def _template_is_one(data: DataConfig) -> None:
    """A template is known or has a place for the question, and says what nothing else says."""
    template = data.prompt_template
    if template is None:
        return
    where = f"data.prompt_template={template}"
    if template not in TEMPLATES and template.count(SLOT) != 1:
        near = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0)[0]
        reason = f"is neither {' nor '.join(TEMPLATES)} nor a text with one {SLOT} in it"
        raise InputError(where, reason, f"the nearest is {near}")
    fixed = "begins with a system message of its own" if template == "boxed" else "is all there is"
    if data.system_prompt is not None and (template in TEMPLATES or not data.chat_template):
        way_out = "unset one of them"
        if template not in TEMPLATES:
            way_out += "; with data.chat_template=true, the template is the user message"
        raise InputError(where, f"{fixed}, and data.system_prompt says another", way_out)
    if template == "boxed" and data.chat_template is False:
        reason = "is a system and a user message, and data.chat_template=false wants plain text"
        raise InputError(where, reason, "unset one of them")
    if template == "octothinker" and (data.chat_template or data.chat_template_kwargs):
        other = "data.chat_template=true" if data.chat_template else "data.chat_template_kwargs"
        reason = f"is plain text for a base model, and {other} wants chat messages"
        raise InputError(where, reason, "unset one of them")
