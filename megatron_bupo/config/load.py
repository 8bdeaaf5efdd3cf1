"""Where do settings come from? Schema defaults, YAML deltas, `key=value` overrides; later wins.

A YAML file may name others it builds on with `defaults: base.yaml` (or a list of files), relative
to itself. Those may not have `defaults` of their own: what a run uses stands in two files at
most, plus the command line. A key that the schema does not have is an error that names the
nearest one; so is a value of the wrong type.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bupo.config.optimizer import OptimizerConfig
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

COMMAND_LINE = "command line"
HIDDEN = "(hidden)"  # stands for a secret

Setting = tuple[str, Any]  # dotted key, value


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """The run that the YAML file `path` (None: no file) and the `key=value` overrides describe."""
    merged = copy.deepcopy(_defaults())
    sources = [] if path is None else _read_with_defaults(Path(expand(path)))
    for where, settings in [*sources, (COMMAND_LINE, _parse_overrides(overrides))]:
        for key, value in settings:
            _set(merged, _switch(key) if isinstance(value, bool) else key, value, where)
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise InputError(key, "has no value", f"set it in the YAML file or as {key}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation `${...}` that leads nowhere
        raise InputError(str(error.full_key), str(error).partition("\n")[0]) from None
    assert isinstance(config, Config)
    critic = dataclasses.replace(config.critic, optimizer=_with_tuples(config.critic.optimizer))
    return dataclasses.replace(config, optimizer=_with_tuples(config.optimizer), critic=critic)


def _with_tuples(optimizer: OptimizerConfig) -> OptimizerConfig:
    """omegaconf < 2.4 reads tuples as lists."""
    return dataclasses.replace(optimizer, betas=tuple(optimizer.betas))


def to_yaml(config: Config) -> str:
    """Every setting of `config`, as `load_config` reads it back; keys to servers left out."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(_without_secrets(config))))


def flatten(config: Config) -> dict[str, object]:
    """Dotted key -> value; tuples as lists, so that it equals its own round trip through JSON."""
    leaves = _leaves_of(dataclasses.asdict(_without_secrets(config)), stop_at=frozenset())
    return {key: list(value) if isinstance(value, tuple) else value for key, value in leaves}


def _without_secrets(config: Config) -> Config:
    """What may be written down."""
    if config.servers.api_key is None:
        return config
    servers = dataclasses.replace(config.servers, api_key=HIDDEN)
    return dataclasses.replace(config, servers=servers)


def expand(path: str) -> str:
    """`path` with a leading `~` expanded. A config keeps paths as written; openers call this."""
    return os.path.expanduser(path)  # noqa: PTH111 - a Path would damage hub ids and URLs


@cache  # OmegaConf takes longer to build it than for all the rest
def _defaults() -> DictConfig:
    """The schema's defaults, open to merging: OmegaConf keeps frozen classes read-only."""
    merged = OmegaConf.structured(Config)
    OmegaConf.set_readonly(merged, False)
    for section in _sections():
        OmegaConf.set_readonly(OmegaConf.select(merged, section), False)
    return merged


def _begin_section(merged: DictConfig, key: str) -> None:
    """Give the optional section that `key` is or is in its defaults, if it is not there yet."""
    for section, kind in _optional_sections().items():
        if f"{key}.".startswith(f"{section}.") and OmegaConf.select(merged, section) is None:
            OmegaConf.update(merged, section, OmegaConf.structured(kind), merge=False)
            OmegaConf.set_readonly(OmegaConf.select(merged, section), False)


def _read_with_defaults(path: Path) -> list[tuple[str, Iterable[Setting]]]:
    """The settings of `path`, those of the files it builds on first."""
    child = _read_yaml(path)
    names = child.pop("defaults", None) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: defaults={names}", "is not a file name or a list of file names")
    sources = []
    for name in names:
        parent = path.parent / expand(name)
        delta = _read_yaml(parent)
        if "defaults" in delta:
            raise InputError(
                f"{parent}: defaults={delta['defaults']}",
                f"{path} already builds on this file, and inheritance is one level deep",
                "merge the two, or list both under the `defaults` of the first file",
            )
        sources.append((str(parent), _leaves_of(delta, stop_at=_values())))
    return [*sources, (str(path), _leaves_of(child, stop_at=_values()))]


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(str(path), f"cannot be read ({reason})", "give a YAML file") from None
    found = _parse_yaml(text, str(path))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(str(path), "is not a mapping of settings", "write `section: {key: value}`")
    return found


def _parse_yaml(text: str, where: str) -> Any:
    """The value of `text` in OmegaConf's YAML, where `1e-6` is a number and keys stand once."""
    try:
        wrapped = OmegaConf.from_dotlist([f"value={text}"])
    except yaml.YAMLError as error:
        reason = f"is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(where, reason, "quote or correct it") from None
    plain = OmegaConf.to_container(wrapped)
    assert isinstance(plain, dict)
    return plain["value"]


def _parse_overrides(overrides: Sequence[str]) -> Iterator[Setting]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override} ({COMMAND_LINE})", "is not of the form key=value")
        value = _spaced(_parse_yaml(text, f"{override} ({COMMAND_LINE})"))
        yield from _leaves_of({key.strip(): value}, stop_at=_values())


def _spaced(value: Any) -> Any:
    """`value` with `{layer:2}` read as `{layer: 2}`: YAML sees a key `layer:2` without a value."""
    if isinstance(value, list):
        return [_spaced(item) for item in value]
    if not isinstance(value, dict):
        return value
    pairs: dict[Any, Any] = {}
    for key, item in value.items():
        name, colon, text = str(key).partition(":")
        if item is None and colon:
            pairs[name] = _parse_yaml(text, f"{key} ({COMMAND_LINE})")
        else:
            pairs[key] = _spaced(item)
    return pairs


def _leaves_of(
    delta: Mapping[Any, Any], stop_at: frozenset[str], prefix: str = ""
) -> Iterator[Setting]:
    """The settings of a nested mapping; mappings at a key in `stop_at` are values themselves."""
    for name, value in delta.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in stop_at:
            if not value and key in _optional_sections():  # all of its defaults
                yield key, value
            yield from _leaves_of(value, stop_at, f"{key}.")
        elif value is not None or key not in _sections():  # `model:` with nothing below it
            yield key, value


@cache
def _schema() -> dict[str, Any]:
    """Dotted key -> type of every setting."""
    return dict(_settings_of(Config, ""))


def _settings_of(section: type, prefix: str) -> Iterator[Setting]:
    for name, kind in get_type_hints(section).items():
        inside = _section_in(kind)
        if inside is not kind:
            yield f"{prefix}{name}", kind
        if inside is not None:
            yield from _settings_of(inside, f"{prefix}{name}.")


def _section_in(kind: Any) -> Any:
    """The dataclass that `kind` is, or that it is if not null; None: it is no section."""
    kinds = get_args(kind) if type(None) in get_args(kind) else [kind]
    return next((k for k in kinds if dataclasses.is_dataclass(k)), None)


@cache
def _sections() -> frozenset[str]:
    """The sections that are always there."""
    return frozenset(key.rpartition(".")[0] for key in _schema() if "." in key) - _schema().keys()


@cache
def _optional_sections() -> dict[str, Any]:
    """Dotted key -> dataclass of the sections that may be null."""
    return {key: _section_in(kind) for key, kind in _schema().items() if _section_in(kind)}


@cache
def _values() -> frozenset[str]:
    """The settings in which a mapping is the value, and not another way to write several."""
    numbers = {key for key, kind in _schema().items() if kind == dict[str, float]}
    return frozenset(_schema().keys() - _optional_sections().keys() - numbers)


def _switch(key: str) -> str:
    """The key that `key=true` means: a section's own is its `enabled`."""
    return switch if (switch := f"{key}.enabled") in _schema() else key


def _set(merged: DictConfig, key: str, value: Any, where: str) -> None:
    """Set `key` to `value` in `merged`; a mapping joins the one there, a list replaces it."""
    kind = _kind(key, value, where)
    nested = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    try:
        if get_origin(kind) is tuple and len(value) != len(get_args(kind)):
            raise TypeError
        if value is not None:
            _begin_section(merged, key)
        merged.merge_with(nested)  # in place: OmegaConf.merge copies all of it first
    except (OmegaConfBaseException, TypeError, ValueError):
        shown = "null" if value is None else value
        raise InputError(f"{key}={shown} ({where})", f"must be {_in_words(kind)}") from None


def _kind(key: str, value: Any, where: str) -> Any:
    """The schema's type at `key`; neither `key` nor a key inside `value` may be unknown."""
    schema = _schema()
    if key in schema:
        _refuse_unknown_fields(key, value, where)
        return schema[key]
    names = key.split(".")
    for above in (schema.get(".".join(names[:i])) for i in range(1, len(names))):
        if get_origin(above) is dict:  # such as megatron.*
            return get_args(above)[1]
    if key in _sections():
        inside = next(name for name in schema if name.startswith(f"{key}."))
        raise InputError(
            f"{key}={value} ({where})", "is a section", f"set keys in it: {inside}=..."
        )
    raise _unknown(key, [*schema, *sorted(_sections())], where)


def _refuse_unknown_fields(key: str, value: Any, where: str) -> None:
    """Each mapping in a list of records has the record's fields only."""
    record = (get_args(_schema()[key]) or (None,))[0]
    if not (dataclasses.is_dataclass(record) and isinstance(value, list)):
        return
    known = [f"{key}.{field.name}" for field in dataclasses.fields(record)]
    for name in (name for row in value if isinstance(row, dict) for name in row):
        if f"{key}.{name}" not in known:
            raise _unknown(f"{key}.{name}", known, where)


def _unknown(key: str, known: Sequence[str], where: str) -> InputError:
    """Nearest by name; a key in the wrong section counts as nearer than one with other letters."""
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, same_leaf or known, n=1, cutoff=0)
    return InputError(f"{key} ({where})", "unknown key", f"the nearest key is {near[0]}")


def _in_words(kind: Any) -> str:
    """A type as a user would say it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in words:
        return words[kind]
    arguments = get_args(kind)
    if type(None) in arguments:
        return f"{_in_words(arguments[0])} or null"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)} numbers"
    if get_origin(kind) is list and not dataclasses.is_dataclass(arguments[0]):
        return f"a list, each {_in_words(arguments[0])}"
    if get_origin(kind) is list:
        fields = ", ".join(field.name for field in dataclasses.fields(arguments[0]))
        return f"a list of {{{fields}}}"
    return "a mapping of settings"
