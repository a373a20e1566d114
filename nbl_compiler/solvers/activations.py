"""Activation functions, each defined once as a sympy expression.

Everything else about an activation follows from its expression: the torch callable, the
derivative, the asymptotes, and the intervals on which the derivative is monotone (between its
kinks and the roots of its second derivative). On such an interval σ'(z) = a has at most one
solution, which is what makes the errors of affine fits exact (:mod:`activation_errors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import mpmath
import sympy
import torch
from torch import Tensor

_Z = sympy.Symbol("z", real=True)


class sigmoid(sympy.Function):
    """1 / (1 + e^(−z)), kept as one symbol so that it is evaluated without overflow."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sigmoid(self.args[0]) * (1 - sigmoid(self.args[0]))

    def _eval_rewrite_as_exp(self, argument: sympy.Expr, **_: object) -> sympy.Expr:
        return 1 / (1 + sympy.exp(-argument))


class normal_cdf(sympy.Function):
    """Φ(z) = (1 + erf(z/√2)) / 2, kept as one symbol so that it loses no digits at negative z."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.exp(-(self.args[0] ** 2) / 2) / sympy.sqrt(2 * sympy.pi)

    def _eval_rewrite_as_exp(self, argument: sympy.Expr, **_: object) -> sympy.Expr:
        return (1 + sympy.erf(argument / sympy.sqrt(2))) / 2


# tanh is written as a sigmoid: 1 + tanh(u) = 2·sigmoid(2u), without cancellation at negative u.
_EXPRESSIONS: dict[str, sympy.Expr] = {
    "gelu": _Z * normal_cdf(_Z),
    "gelu_tanh": _Z
    * sigmoid(2 * sympy.sqrt(2 / sympy.pi) * (_Z + sympy.Rational(44715, 1_000_000) * _Z**3)),
    "quick_gelu": _Z * sigmoid(sympy.Rational(1702, 1000) * _Z),
    "silu": _Z * sigmoid(_Z),
    "relu": sympy.Piecewise((sympy.Integer(0), _Z <= 0), (_Z, True)),
    "relu2": sympy.Piecewise((sympy.Integer(0), _Z <= 0), (_Z**2, True)),
}

ACTIVATION_NAMES: tuple[str, ...] = tuple(_EXPRESSIONS)
"""``gelu`` (erf), ``gelu_tanh``, ``quick_gelu`` (z·sigmoid(1.702 z)), ``silu``, ``relu`` and
``relu2`` (the squared ReLU)."""

_TORCH_FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "normal_cdf": lambda z: torch.special.erfc(-math.sqrt(0.5) * z) / 2,
    "exp": torch.exp,
}
_MPMATH_FUNCTIONS = {"sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)), "normal_cdf": mpmath.ncdf}

_INFLECTION_SEARCH = 48
"""Roots of σ'' are looked for in [−48, 48]: beyond it σ' equals its limits to a float64 rounding.
A test proves with interval arithmetic that none is missed."""
_INFLECTION_STEP = sympy.Rational(1, 8)
_INFLECTION_DIGITS = 40


@dataclass(frozen=True)
class Activation:
    """An activation function σ and what follows from its expression.

    Args:
        name: One of :data:`ACTIVATION_NAMES`.
        expression: σ in the symbol ``z``; piecewise expressions are split at their boundaries.
    """

    name: str
    expression: sympy.Expr

    def __call__(self, z: Tensor) -> Tensor:
        """σ(z), elementwise, in the dtype of ``z``."""
        return self._value(z)

    def derivative(self, z: Tensor) -> Tensor:
        """σ'(z), elementwise; at a kink, the derivative from the left. ``z`` must be finite."""
        return self._derivative(z.clamp(self.tails[0], self.tails[1]))

    @cached_property
    def derivative_expression(self) -> sympy.Expr:
        """σ' in the symbol ``z``."""
        return sympy.diff(self.expression, _Z)

    @cached_property
    def kinks(self) -> tuple[float, ...]:
        """Boundaries between the smooth parts of the expression, ascending."""
        return tuple(end for _, end in _smooth_parts(self.expression)[:-1])

    @cached_property
    def breakpoints(self) -> tuple[float, ...]:
        """Where the monotone pieces of σ' meet, ascending: kinks and roots of σ''.

        σ' is monotone on each of the ``len(breakpoints) + 1`` intervals between them, of which
        the first and the last are unbounded.
        """
        roots = _inflections(sympy.diff(self.expression, _Z, 2), self.kinks)
        return tuple(sorted({*self.kinks, *roots}))

    @cached_property
    def asymptotes(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """(slope, intercept) of the lines that σ approaches at −∞ and at +∞.

        None where σ grows faster than any line.
        """
        return _asymptote(self.expression, -sympy.oo), _asymptote(self.expression, sympy.oo)

    @cached_property
    def tails(self) -> tuple[float, float]:
        """(left, right): beyond these σ equals its asymptote in float64; ±∞ without asymptote."""
        left, right = self.asymptotes
        return -_tail(self._value, left, -1.0), _tail(self._value, right, 1.0)

    @cached_property
    def _value(self) -> Callable[[Tensor], Tensor]:
        return _torch_function(self.expression)

    @cached_property
    def _derivative(self) -> Callable[[Tensor], Tensor]:
        return _torch_function(self.derivative_expression)


@cache
def activation(name: str) -> Activation:
    """The activation called ``name``, one of :data:`ACTIVATION_NAMES`.

    Raises:
        ValueError: for any other name.
    """
    if name not in _EXPRESSIONS:
        known = ", ".join(ACTIVATION_NAMES)
        raise ValueError(f"unknown activation {name!r}; the known ones are {known}")
    return Activation(name, _EXPRESSIONS[name])


def _smooth_parts(expression: sympy.Expr) -> list[tuple[sympy.Expr, float]]:
    """The smooth parts of an expression from left to right, each with its right end."""
    if not isinstance(expression, sympy.Piecewise):
        return [(expression, math.inf)]
    parts = []
    for part, condition in expression.args:
        end = math.inf if condition == sympy.true else float(condition.as_set().sup)
        parts.append((part, end))
    return parts


def _torch_function(expression: sympy.Expr) -> Callable[[Tensor], Tensor]:
    """Compile an expression to an elementwise torch function; NaN falls through to NaN."""
    parts = [
        (sympy.lambdify(_Z, part, modules=[_TORCH_FUNCTIONS, "math"]), end)
        for part, end in _smooth_parts(expression)
    ]

    def evaluate(z: Tensor) -> Tensor:
        last, _ = parts[-1]
        value = _as_tensor(last(z), z)
        for part, end in reversed(parts[:-1]):
            value = torch.where(z <= end, _as_tensor(part(z), z), value)
        return value

    return evaluate


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """A constant part of an expression as a tensor; NaN inputs stay NaN."""
    return value if isinstance(value, Tensor) else torch.where(like.isnan(), like, float(value))


def _inflections(second: sympy.Expr, kinks: tuple[float, ...]) -> list[float]:
    """Roots of σ'' inside the smooth parts, by a sign scan and bisection in 40 digits."""
    roots: list[float] = []
    start = -float(_INFLECTION_SEARCH)
    for part, end in _smooth_parts(second):
        stop = min(end, float(_INFLECTION_SEARCH))
        if part.has(_Z):
            roots += _sign_changes(part, start, stop)
        start = stop
    return [root for root in roots if root not in kinks]


def _sign_changes(expression: sympy.Expr, start: float, stop: float) -> list[float]:
    function = sympy.lambdify(_Z, expression, modules=[_MPMATH_FUNCTIONS, "mpmath"])
    roots = []
    with mpmath.workdps(_INFLECTION_DIGITS):
        step = mpmath.mpf(int(_INFLECTION_STEP.p)) / int(_INFLECTION_STEP.q)
        # Half a step off the grid, so that no root at a round number is hit exactly.
        points = [mpmath.mpf(start)]
        while points[-1] < stop:
            points.append(min(points[-1] + step, mpmath.mpf(stop)))
        points[1:-1] = [point - step / 2 for point in points[1:-1]]
        signs = [mpmath.sign(function(point)) for point in points]
        for left, right, before, after in zip(points, points[1:], signs, signs[1:], strict=False):
            if before * after < 0:
                roots.append(float(mpmath.findroot(function, (left, right), solver="anderson")))
    return roots


def _asymptote(expression: sympy.Expr, end: sympy.Expr) -> tuple[float, float] | None:
    smooth = _smooth_parts(expression)[0 if end == -sympy.oo else -1][0].rewrite(sympy.exp)
    slope = sympy.limit(sympy.diff(smooth, _Z), _Z, end)
    if not slope.is_finite:
        return None
    return float(slope), float(sympy.limit(smooth - slope * _Z, _Z, end))


def _tail(
    value: Callable[[Tensor], Tensor], line: tuple[float, float] | None, side: float
) -> float:
    """Smallest power of two beyond which ``value`` equals the line in float64."""
    if line is None:
        return math.inf
    slope, intercept = line
    distance = 1.0
    while True:
        z = torch.tensor(side * distance, dtype=torch.float64)
        if float(value(z)) == slope * side * distance + intercept:
            return distance
        distance *= 2
