"""How far may a mean of few values be from the truth? As far as Student's distribution says."""

from __future__ import annotations

import math
from functools import cache

_NORMAL_FROM = 10_000  # degrees of freedom, where Student's distribution is the normal one


@cache
def student_quantile(confidence: float, freedom: int) -> float:
    """t such that Student's distribution with `freedom` degrees has `confidence` in [-t, t]."""
    low, high = 0.0, 1.0
    while student_inside(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if student_inside(middle, freedom) < confidence else (low, middle)
        )
    return high


def student_inside(t: float, freedom: int) -> float:
    """The probability of [-t, t]: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    if freedom >= _NORMAL_FROM:
        return math.erf(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
