from __future__ import annotations

MCORE_EXECUTABLE = "uv run --extra mcore"
ACTOR_ENVIRONMENT_REGISTRY: dict[str, str] = {}
