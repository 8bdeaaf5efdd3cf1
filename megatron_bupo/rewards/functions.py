"""Which function grades, and what does it want to know? `reward.function` and its signature tell.

The plain form is `fn(response, answer) -> float`, both strings. Further parameters are filled by
name: `prompt` (what the model read, as text), `row` (the data row as a dict), `response_ids`,
`finish_reason`. A function written for verl, `fn(data_source, solution_str, ground_truth,
extra_info=None)`, works as it is where it returns a number.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.types import Rollout

BUILT_IN = {
    "math": "megatron_bupo.rewards.math_answers:math",
    "exact_match": "megatron_bupo.rewards.math_answers:exact_match",
}
_WRITE = (
    f"choose {' or '.join(BUILT_IN)}, or write package.module:function or path/to/file.py:function"
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
        """The `(args, kwargs)` that grade `rollout`."""
        return (
            tuple(FILLED[name](rollout) for name in self.positional),
            {name: FILLED[name](rollout) for name in self.keywords},
        )


def resolve(name: str) -> Callable[..., Any]:
    """The function that `reward.function` names, checked to be one that can grade a rollout."""
    source, colon, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not (source and colon and attribute):
        raise InputError(
            f"reward.function={name}", "is neither built in nor an import path", _WRITE
        )
    module = _import(name, source)
    try:
        function = attrgetter(attribute)(module)
    except AttributeError:
        way_out = f"it defines {', '.join(_public_functions(module)) or 'no function'}"
        raise InputError(
            f"reward.function={name}", f"{source} has no {attribute}", way_out
        ) from None
    if not callable(function):
        kind = type(function).__name__
        raise InputError(f"reward.function={name}", f"is a {kind}, not a function", _WRITE)
    arguments_of(function, name)
    return function


def absolute(name: str) -> str:
    """The same name for a process elsewhere: a file's path made absolute."""
    source, colon, attribute = name.rpartition(":")
    return f"{Path(source).resolve()}{colon}{attribute}" if _is_file(source) else name


def arguments_of(function: Callable[..., Any], name: str) -> Arguments:
    """What `function`, called `name` in the config, is to be called with."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions written in C do not tell
        return Arguments(("response", "answer"), ())
    positional: tuple[str, ...] = ()
    if not any(pair <= {p.name for p in parameters} for pair in _BY_NAME):
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
            way_out = "let response and answer come first"
            raise InputError(f"reward.function={name}", reason, way_out)
        parameters = [p for p in parameters if p.name not in leading]
    unknown = [p for p in parameters if p.name not in FILLED and _is_required(p)]
    if unknown:
        reason = f"has parameters that nothing fills: {_names(unknown)}"
        way_out = f"give them defaults, or choose among {', '.join(FILLED)}"
        raise InputError(f"reward.function={name}", reason, way_out)
    return Arguments(positional, tuple(p.name for p in parameters if p.name in FILLED))


def _names(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(p.name for p in parameters)


def _is_required(parameter: inspect.Parameter) -> bool:
    starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not starred


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _import(name: str, source: str) -> ModuleType:
    """The module or file `source`; what it imports may lie beside that file or in the cwd."""
    path = Path(source).resolve()
    if _is_file(source) and not path.is_file():
        raise InputError(f"reward.function={name}", f"there is no file {path}", _WRITE)
    beside = str(path.parent if _is_file(source) else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        return _import_file(path) if _is_file(source) else importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and f"{source}.".startswith(f"{error.name}."):
            way_out = "check the spelling, or put its directory on PYTHONPATH"
            reason = f"there is no module {error.name}"
            raise InputError(f"reward.function={name}", reason, way_out) from error
        raise _import_error(name, source, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, source, error) from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _import_error(name: str, source: str, error: BaseException) -> InputError:
    reason = f"importing {source} raises {type(error).__name__}: {error}"
    return InputError(f"reward.function={name}", reason, "make `import` of it work on its own")


def _public_functions(module: ModuleType) -> list[str]:
    return [
        n
        for n, value in vars(module).items()
        if inspect.isfunction(value) and not n.startswith("_")
    ]
