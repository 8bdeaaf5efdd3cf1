"""How large is the model that a recipe names, if it is not on this machine?

`models/NAME/config.json` are the published ones, down to the facts that decide sizes. A path is
taken for the longest of these names that its last part begins with: `models/Qwen3-8B-Base` is a
Qwen3-8B. A model that is there is read and never guessed.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_bupo.config import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture

MODELS = Path(__file__).parent / "models"


def sizes_of(path: str, key: str, *, value_head: bool = False) -> tuple[Architecture, str]:
    """The architecture of the model at `path`, which the setting `key` names, and where its sizes
    come from.
    """
    folder = Path(expand(path))
    if (folder / "config.json").exists():
        return read_architecture(folder, value_head=value_head), f"{folder}/config.json"
    known = _known_as(folder.name)
    if known is None:
        names = ", ".join(sorted(known.name for known in MODELS.iterdir()))
        raise InputError(
            f"{key}={path}",
            "has no config.json here, and its name tells of no model whose sizes are known",
            f"give the directory of a checkpoint (its config.json is enough), or one of {names}",
        )
    sizes = read_architecture(known, value_head=value_head)
    return sizes, f"those of {known.name}, by its name: {path} is not here"


def models_of(config: Config) -> tuple[Architecture, Architecture | None, tuple[str, ...]]:
    """Policy and critic (None without one) of a recipe, and where their sizes come from."""
    policy, source = sizes_of(config.model.path, "model.path")
    if not config.has_critic:
        return policy, None, (f"model: {source}",)
    path = config.of_critic.model.path
    critic, its_source = sizes_of(path, "critic.path", value_head=True)
    return policy, critic, (f"model: {source}", f"critic: {its_source}")


def _known_as(name: str) -> Path | None:
    name = name.removeprefix("Meta-").lower()
    fitting = [
        known
        for known in MODELS.iterdir()
        if re.fullmatch(rf"{re.escape(known.name.lower())}([-_.].*)?", name)
    ]
    return max(fitting, key=lambda known: len(known.name), default=None)
