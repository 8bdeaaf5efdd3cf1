"""Which function grades, and what does it want to know? Its name and its signature tell.

The plain form is `fn(response, answer) -> float`, both strings. Further parameters are filled by
name: `prompt` (what the model read, as text), `row` (the data row as a dict), `response_ids`,
`finish_reason`; a function all of whose parameters are such names needs no `answer`. A function
written for verl, `fn(data_source, solution_str, ground_truth, extra_info=None)`, works as it is
where it returns a number. `reward.options` are keyword arguments beside these.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.types import Rollout

BUILT_IN = {
    "math": "megatron_bupo.rewards.math_answers:math",
    "exact_match": "megatron_bupo.rewards.exact_match:exact_match",
    "format": "megatron_bupo.rewards.shaping:format_",
    "length": "megatron_bupo.rewards.shaping:length",
    "overlong": "megatron_bupo.rewards.shaping:overlong",
    "repetition": "megatron_bupo.rewards.shaping:repetition",
}
_WRITE = (
    f"choose {', '.join(BUILT_IN)}, or write package.module:function, path/to/file.py:function or "
    "http://HOST:PORT/PATH"
)


def _column(rollout: Rollout, name: str) -> Any:
    return (rollout.prompt.row or {}).get(name)


# What can be filled in, by parameter name; the last four are verl's.
FILLED: dict[str, Callable[[Rollout], Any]] = {
    "response": lambda rollout: rollout.text,
    "answer": lambda rollout: rollout.prompt.answer,
    "prompt": lambda rollout: rollout.prompt.text,
    "row": lambda rollout: dict(rollout.prompt.row or {}),
    "response_ids": lambda rollout: list(rollout.response_ids),
    "finish_reason": lambda rollout: rollout.finish_reason,
    "solution_str": lambda rollout: rollout.text,
    "ground_truth": lambda rollout: rollout.prompt.answer,
    "data_source": lambda rollout: _column(rollout, "data_source"),
    "extra_info": lambda rollout: _column(rollout, "extra_info"),
}
_BY_NAME = ({"response", "answer"}, {"solution_str", "ground_truth"})


@dataclass(frozen=True)
class Arguments:
    """How a reward function is called; names are keys of `FILLED`."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def of(self, rollout: Rollout) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The `(args, kwargs)` that grade `rollout`, without the options."""
        return (
            tuple(FILLED[name](rollout) for name in self.positional),
            {name: FILLED[name](rollout) for name in self.keywords},
        )


def resolve(name: str, *, key: str = "reward.function") -> Callable[..., Any]:
    """The function that `name`, the value of `key`, names."""
    where = f"{key}={name}"
    source, colon, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not (source and colon and attribute):
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise InputError(
            where,
            "is neither built in nor an import path",
            (f"the nearest is {near[0]}; or " if near else "") + _WRITE,
        )
    module = _import(where, source)
    try:
        function = attrgetter(attribute)(module)
    except AttributeError:
        way_out = f"it defines {', '.join(_public_functions(module)) or 'no function'}"
        raise InputError(where, f"{source} has no {attribute}", way_out) from None
    if not callable(function):
        kind = type(function).__name__
        raise InputError(where, f"is a {kind}, not a function", _WRITE)
    return function


def absolute(name: str) -> str:
    """The same name for a process elsewhere: a file's path made absolute."""
    source, colon, attribute = name.rpartition(":")
    return f"{Path(source).resolve()}{colon}{attribute}" if _is_file(source) else name


def arguments_of(
    function: Callable[..., Any],
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    key: str = "reward.function",
) -> Arguments:
    """What `function`, called `name` under `key` of the config, is to be called with beside its
    `options`.
    """
    where, options = f"{key}={name}", options or {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions written in C do not tell
        return Arguments(("response", "answer"), ())
    _check_options(where, parameters, options)
    parameters = [p for p in parameters if p.name not in options]
    positional: tuple[str, ...] = ()
    if not _is_called_by_name(parameters):
        positional = ("response", "answer")
        leading = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ][:2]
        starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        claimed = [
            n for n, own in zip(leading, positional, strict=False) if n in FILLED and n != own
        ]
        if claimed or not (starred or len(leading) == 2):
            reason = (
                f"cannot be called as fn(response, answer), its parameters are {_names(parameters)}"
            )
            raise InputError(where, reason, "let response and answer come first")
        parameters = [p for p in parameters if p.name not in leading]
    unknown = [p for p in parameters if p.name not in FILLED and _is_required(p)]
    if unknown:
        reason = f"has parameters that nothing fills: {_names(unknown)}"
        keys = ", ".join(f"{_options(where)}.{p.name}" for p in unknown)
        raise InputError(where, reason, f"set {keys}, or choose among {', '.join(FILLED)}")
    return Arguments(positional, tuple(p.name for p in parameters if p.name in FILLED))


def _is_called_by_name(parameters: list[inspect.Parameter]) -> bool:
    names = {p.name for p in parameters}
    first = {p.name for p in parameters if _is_required(p) and p.kind is not p.KEYWORD_ONLY}
    return any(pair <= names for pair in _BY_NAME) or bool(first and first <= FILLED.keys())


def _options(where: str) -> str:
    return where.partition("=")[0].removesuffix("function") + "options"


def _check_options(
    where: str, parameters: list[inspect.Parameter], options: Mapping[str, Any]
) -> None:
    """Every option is the name of a parameter that a keyword can reach."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    takes = [
        p.name
        for p in parameters
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in FILLED
    ]
    for option in options:
        if option not in takes:
            near = difflib.get_close_matches(option, takes, n=1)
            there = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise InputError(
                f"{_options(where)}.{option}",
                f"is no option of {where.partition('=')[2]}",
                f"the nearest is {near[0]}" if near else there,
            )


def _names(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(p.name for p in parameters)


def _is_required(parameter: inspect.Parameter) -> bool:
    starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not starred


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _import(where: str, source: str) -> ModuleType:
    """The module or file `source`; what it imports may lie beside that file or in the cwd."""
    path = Path(source).resolve()
    if _is_file(source) and not path.is_file():
        raise InputError(where, f"there is no file {path}", _WRITE)
    beside = str(path.parent if _is_file(source) else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        return _import_file(path) if _is_file(source) else importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and f"{source}.".startswith(f"{error.name}."):
            way_out = "check the spelling, or put its directory on PYTHONPATH"
            reason = f"there is no module {error.name}"
            raise InputError(where, reason, way_out) from error
        raise _import_error(where, source, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(where, source, error) from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _import_error(where: str, source: str, error: BaseException) -> InputError:
    reason = f"importing {source} raises {type(error).__name__}: {error}"
    return InputError(where, reason, "make `import` of it work on its own")


def _public_functions(module: ModuleType) -> list[str]:
    return [
        n
        for n, value in vars(module).items()
        if inspect.isfunction(value) and not n.startswith("_")
    ]
