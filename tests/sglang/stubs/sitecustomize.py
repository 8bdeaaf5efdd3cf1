"""What SGLang imports and, for a text model on a CPU, never calls: so that it runs on a laptop.

Python imports this file by itself where the folder is on PYTHONPATH. Three packages have wheels for
CUDA only, or would bring a CUDA build of torch along, and their names are looked up while SGLang
imports its modules:

- `triton`: kernels are decorated, and their parameters annotated, where they are defined. Two of
  its functions are plain arithmetic that is called on a CPU too; those are real here.
- `sgl_kernel`: SGLang's own kernels; on a CPU they need AMX instructions, without which SGLang
  takes torch's operations instead.
- `torchvision`: for images; its `InterpolationMode` is listed, member by member, at import.

All that is computed is computed by SGLang and torch themselves. Whoever asks whether one of the
packages is installed (`importlib.util.find_spec`) is told that it is not.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

ABSENT = {"sgl_kernel", "torchvision", "triton"}
INTERPOLATION = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"


class Absent(types.ModuleType):
    """A module or function of an absent package: any name is in it, and as a decorator, with
    arguments or without, it leaves a function as it is.
    """

    __version__ = "3.7.1"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        value = REAL.get(full) or (
            type(name, (), {"__class_getitem__": lambda _: object, "__init__": _ignore})
            if name[0].isupper()
            else importlib.import_module(full)
        )
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not options:
            return args[0]
        return lambda function=None, *_, **__: function


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes them up."""

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        absent = fullname.partition(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def _ignore(*_: Any, **__: Any) -> None: ...


def _told_absent(find_spec: Callable[..., Any]) -> Callable[..., Any]:
    def find(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in ABSENT else find_spec(name, package)

    return find


REAL = {
    "triton.cdiv": lambda a, b: -(-a // b),
    "triton.next_power_of_2": lambda n: 1 << max(0, n - 1).bit_length(),
    "torchvision.transforms.InterpolationMode": enum.Enum("InterpolationMode", INTERPOLATION),
}
importlib.util.find_spec = _told_absent(importlib.util.find_spec)
sys.meta_path.append(Finder())
