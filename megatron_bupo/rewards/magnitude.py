"""Would sympy come to an end with this? Working out `9^{9^{9^9}}` takes longer than there is time.

A parsed answer is a tree that nobody has evaluated yet. This walks it once and bounds, from the
leaves up, two numbers: log2 of the absolute value, and the bits that the exact value would be
written with (of a power of a sum: its terms). Where either goes over `MOST_BITS`, the answer is
refused unevaluated, in a millisecond. The bounds are rough, but `2^{2024}`, `100!`,
`\\binom{200}{100}` and `(x+1)^{50}` are far below the limit and `7^{7777777}` is above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import sympy
from sympy import Basic, MatrixBase

MOST_BITS = 1_000_000


class TooLarge(ValueError):
    """An answer that would be worked out for ever."""


class _Size(NamedTuple):
    log2: float  # of the absolute value, from above; of a symbol: nothing is known, so 1
    bits: float  # that the exact value takes


def check_size(expression: Basic | MatrixBase) -> None:
    """Raise TooLarge if working `expression` out takes more than `MOST_BITS`."""
    if isinstance(expression, MatrixBase):
        for entry in expression.flat():
            check_size(entry)
        return
    try:
        _size(expression)
    except (OverflowError, RecursionError) as error:
        raise TooLarge(_message()) from error


def _message() -> str:
    return f"the answer has a number of more than {MOST_BITS:,} bits, and is not worked out"


def _size(tree: Basic) -> _Size:
    size = _size_of(tree)
    if size.log2 > MOST_BITS or size.bits > MOST_BITS:
        raise TooLarge(_message())
    return size


def _size_of(tree: Basic) -> _Size:
    if not tree.args:
        return _of_leaf(tree)
    if isinstance(tree, sympy.Sum | sympy.Product):
        return _of_loop(tree)
    sizes = [_size(arg) for arg in tree.args if isinstance(arg, Basic)]
    rule = next((rule for kinds, rule in _RULES if isinstance(tree, kinds)), _of_any)
    return rule(tree, sizes)


def _of_leaf(tree: Basic) -> _Size:
    if isinstance(tree, sympy.Rational):
        p, q = abs(tree.p), tree.q
        return _Size(_log2(p) - _log2(q), p.bit_length() + (q.bit_length() if q > 1 else 0))
    if isinstance(tree, sympy.Float):
        return _Size(float(sympy.log(abs(tree), 2)) if tree else 0.0, 53)
    return _Size(2.0, 1)  # pi, i; a symbol, of which nothing is known


def _log2(number: float) -> float:
    return math.log2(number) if number > 1 else 0.0


def _value(size: _Size) -> float:
    return 2.0**size.log2 if size.log2 < 64 else math.inf


def _known(tree: Basic, size: _Size) -> float:
    """The value from above, of what is a number; with a symbol in it nothing is worked out."""
    return _value(size) if tree.is_number else 1.0


def _of_any(_: Basic, sizes: list[_Size]) -> _Size:
    log2 = max((size.log2 for size in sizes), default=0.0)
    return _Size(log2 + _log2(len(sizes)), sum(size.bits for size in sizes))


def _of_product(_: Basic, sizes: list[_Size]) -> _Size:
    return _Size(sum(size.log2 for size in sizes), sum(size.bits for size in sizes))


def _of_power(tree: Basic, sizes: list[_Size]) -> _Size:
    base, exponent = tree.args
    if not exponent.is_number:  # it stays as it is
        return _Size(sizes[0].log2, sizes[0].bits + sizes[1].bits)
    times = _value(sizes[1])
    bits = sizes[0].bits * max(times, 1.0) + sizes[1].bits
    if isinstance(base, sympy.Add) and base.free_symbols and times <= MOST_BITS:
        terms = len(base.args)  # multiplied out it has so many, of a hundred bits or so
        bits = max(bits, 100 * math.comb(int(times) + terms - 1, terms - 1))
    return _Size(abs(sizes[0].log2) * times, bits)


def _of_exponential(_: Basic, sizes: list[_Size]) -> _Size:
    return _Size(1.45 * _value(sizes[0]), sizes[0].bits)


def _of_factorial(tree: Basic, sizes: list[_Size]) -> _Size:
    n = _known(tree.args[0], sizes[0])
    return _Size(n * _log2(n), n * _log2(n))


def _of_binomial(tree: Basic, sizes: list[_Size]) -> _Size:
    n, k = (_known(arg, size) for arg, size in zip(tree.args, sizes, strict=True))
    bits = min(n, k * _log2(n))
    return _Size(bits, bits)


def _of_loop(tree: sympy.Sum | sympy.Product) -> _Size:
    """Summing and multiplying term by term, where the number of terms is known."""
    term, rounds = _size(tree.function), 1.0
    for limits in tree.limits:
        bounds = [arg for arg in limits[1:] if arg.is_number and arg.is_finite]
        rounds *= max((_value(_size(bound)) for bound in bounds), default=1.0)
    return _Size(rounds * max(term.log2, 1.0), rounds * term.bits)


_RULES: tuple[tuple[Any, Callable[[Basic, list[_Size]], _Size]], ...] = (
    (sympy.Pow, _of_power),
    (sympy.Mul, _of_product),
    (sympy.exp, _of_exponential),
    ((sympy.factorial, sympy.gamma), _of_factorial),
    (sympy.binomial, _of_binomial),
)
