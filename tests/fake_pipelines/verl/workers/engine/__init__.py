"""verl's registry of engines: one that names a vendor comes before one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class BaseEngine:
    pass


class EngineRegistry:
    engines: ClassVar[dict[Any, type]] = {}

    @classmethod
    def register(
        cls,
        model_type: str,
        backend: list[str] | str,
        device: list[str] | str = "cuda",
        vendor: list[str] | str | None = None,
    ) -> Callable[[type], type]:
        def decorator(engine_class: type) -> type:
            for name in backend if isinstance(backend, list) else [backend]:
                for one in vendor if isinstance(vendor, list) else [vendor]:
                    cls.engines[model_type, name, device, one] = engine_class
            return engine_class

        return decorator
