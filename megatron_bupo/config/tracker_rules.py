"""Which trackers are there, are they installed, and what of the settings may they be told?"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping

from megatron_bupo.config.load import HIDDEN
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

TRACKERS = ("wandb", "trackio")
# What may be a key or a password, by its name; and the user:password@ of an address
SECRET = re.compile(r"(?i)^servers\.env\.|api_?key|secret|password|credential|(^|[._])token$")
CREDENTIALS = re.compile(r"//[^/@\s]+@")


def check_trackers(config: Config) -> None:
    """`logging.trackers` names trackers, each once, and what they need has a value."""
    named = config.logging.trackers
    for name in named:
        if name not in TRACKERS:
            near = difflib.get_close_matches(str(name).lower(), TRACKERS, n=1, cutoff=0)[0]
            reason = f"{name} is none of {', '.join(TRACKERS)}"
            raise InputError(f"logging.trackers={_list(named)}", reason, f"the nearest is {near}")
    if len(set(named)) < len(named):
        raise InputError(f"logging.trackers={_list(named)}", "names one twice", "name each once")
    for key in ("project", "name") if named else ():
        value = getattr(config.logging, key)
        if value is not None and (not value.strip() or re.search(r"[/\\#?%:\n]", value)):
            reason = r"is no name to a tracker, for it is empty or has one of / \ # ? % :"
            raise InputError(f"logging.{key}={value}", reason, "choose another")


def check_installed(config: Config) -> None:
    """The packages of the trackers are there; looked for, not imported."""
    for name in config.logging.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise InputError(
                f"logging.trackers={_list(config.logging.trackers)}",
                f"the package {name} is not installed",
                f"pip install 'megatron-bupo[{name}]', or leave it out",
            )


def _list(names: list[str]) -> str:
    return f"[{','.join(map(str, names))}]"


def shareable(settings: Mapping[str, object]) -> dict[str, object]:
    """`settings` by dotted key as others may see them: what may be secret is hidden."""
    return {key: _shareable(key, value) for key, value in settings.items()}


def _shareable(key: str, value: object) -> object:
    if isinstance(value, str):
        return HIDDEN if value and SECRET.search(key) else CREDENTIALS.sub(f"//{HIDDEN}@", value)
    if isinstance(value, list):
        return [_shareable(key, item) for item in value]
    return value
