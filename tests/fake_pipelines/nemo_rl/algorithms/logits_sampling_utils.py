from __future__ import annotations

from typing import Any


def need_top_k_or_top_p_filtering(sampling_params: Any) -> bool:
    return sampling_params is not None
