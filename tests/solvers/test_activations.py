"""Activations: the expressions against torch, the derived calculus, and the exact affine errors."""

from __future__ import annotations

import math

import mpmath
import pytest
import sympy
import torch
from helpers.rounding_slack import lipschitz
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import iv

from nbl_compiler.solvers.activation_errors import (
    affine_residual_extremes,
    max_affine_error,
    stationary_points,
)
from nbl_compiler.solvers.activations import (
    ACTIVATION_NAMES,
    Activation,
    activation,
    normal_cdf,
    sigmoid,
)

# Two float64 evaluations of the same function by different formulas.
SAME_FUNCTION = {"rtol": 1e-13, "atol": 1e-15}
# The slack of the bound: a few hundred float64 roundings of terms of size one.
ATTAINED = 1e-9
SAMPLES = 1001

TORCH = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z).square(),
}

every_activation = pytest.mark.parametrize("name", ACTIVATION_NAMES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@every_activation
def test_value_is_torchs(name: str) -> None:
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    # torch's own GELUs cancel at negative z; that loses eps·|z| absolutely.
    torch.testing.assert_close(activation(name)(z), TORCH[name](z), rtol=1e-13, atol=1e-14)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_keeps_the_dtype_and_nan(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([math.nan, 0.5], dtype=dtype)
    value = activation(name)(z)
    assert value.dtype == dtype
    assert value.isnan().tolist() == [True, False]


@every_activation
def test_derivative_is_autograds(name: str) -> None:
    z = torch.linspace(-12, 12, 4800, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(TORCH[name](z).sum(), z)
    torch.testing.assert_close(
        activation(name).derivative(z.detach()), gradient, rtol=1e-12, atol=1e-14
    )


@every_activation
def test_huge_inputs_do_not_overflow(name: str) -> None:
    sigma = activation(name)
    z = double(-1e300, -1e30, -1e4, 1e4, 1e30, 1e150)
    slopes = (
        double(0, 0, 0, 1, 1, 1) if name != "relu2" else torch.cat([double(0, 0, 0), 2 * z[3:]])
    )
    assert torch.equal(sigma.derivative(z), slopes)
    assert torch.equal(sigma(z), TORCH["relu2" if name == "relu2" else "relu"](z))


@every_activation
def test_known_breakpoints(name: str) -> None:
    known = {"gelu": math.sqrt(2), "silu": 2.399357280515467, "relu": 0.0, "relu2": 0.0}
    points = activation(name).breakpoints
    if name in known:
        assert max(abs(point) for point in points) == pytest.approx(known[name], abs=1e-14)
    assert list(points) == sorted(-point for point in points)


def _interval_function(expression: sympy.Expr):
    """The expression in mpmath's interval arithmetic; it holds no Φ after two derivatives."""
    modules = [
        {
            "sigmoid": lambda z: 1 / (1 + iv.exp(-z)),
            "exp": iv.exp,
            "sqrt": lambda v: iv.sqrt(v),
            "pi": iv.pi,
        }
    ]
    return sympy.lambdify(sympy.Symbol("z", real=True), expression, modules=modules)


@pytest.mark.parametrize(
    ("name", "reach"), [("gelu", 16.0), ("gelu_tanh", 16.0), ("quick_gelu", 32.0), ("silu", 48.0)]
)
def test_no_inflection_is_missed(name: str, reach: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interval arithmetic proves σ'' ≠ 0 within the reach, away from the breakpoints found.

    Next to a breakpoint, where σ'' has its root, σ''' ≠ 0 proves that there is only one. Beyond
    the reach, σ' is within one rounding of its limit.
    """
    # 1 − sigmoid cancels down to e^(−320) in the tail of the tanh GELU.
    monkeypatch.setattr(iv, "prec", 640)
    sigma = activation(name)
    z = sympy.Symbol("z", real=True)
    second = sympy.diff(sigma.expression, z, 2)
    assert not second.has(normal_cdf)
    curvature, change = _interval_function(second), _interval_function(sympy.diff(second, z))
    near = 1 / 16
    roots = sigma.breakpoints
    for root in roots:
        assert 0 not in change(iv.mpf([root - near, root + near]))
    edges = [-reach, *(side for root in roots for side in (root - near, root + near)), reach]
    pending = list(zip(edges[::2], edges[1::2], strict=True))
    while pending:
        left, right = pending.pop()
        if 0 in curvature(iv.mpf([left, right])):
            assert right - left > 1e-6, f"σ'' may vanish at {left}"
            middle = (left + right) / 2
            pending += [(left, middle), (middle, right)]
    tails = sigma.derivative(double(-reach, reach))
    torch.testing.assert_close(tails, double(0.0, 1.0), rtol=0, atol=torch.finfo(torch.float64).eps)


@every_activation
def test_asymptotes_and_tails(name: str) -> None:
    sigma = activation(name)
    assert sigma.asymptotes == ((0.0, 0.0), None if name == "relu2" else (1.0, 0.0))
    left, right = sigma.tails
    beyond = double(left, 2 * left, 1e3 * left)
    assert torch.equal(sigma(beyond).abs(), torch.zeros(3, dtype=torch.float64))
    if math.isfinite(right):
        beyond = double(right, 2 * right, 1e3 * right)
        assert torch.equal(sigma(beyond), beyond)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'mish'.*gelu"):
        activation("mish")


@every_activation
def test_stationary_points_solve_the_derivative(name: str) -> None:
    sigma = activation(name)
    slope = torch.linspace(-0.1, 1.1, 25, dtype=torch.float64)
    lo, hi = torch.full_like(slope, -12), torch.full_like(slope, 12)
    points = stationary_points(sigma, lo, hi, slope)
    assert points.shape == (25, len(sigma.breakpoints) + 1)
    sampled = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    derivative = sigma.derivative(sampled)
    for a, found in zip(slope.tolist(), points, strict=True):
        signs = (derivative - a).sign()
        roots = sampled[1:][signs[1:] * signs[:-1] < 0]
        for root in roots.tolist():
            assert float((found - root).abs().min()) < 2e-3  # the sampling step is 1e-3


def _dense_error(sigma: Activation, lo: float, hi: float, slope: float, intercept: float) -> float:
    z = torch.linspace(lo, hi, SAMPLES, dtype=torch.float64).clamp(lo, hi)
    return float((sigma(z) - slope * z - intercept).abs().max())


ordinary = st.floats(-8, 8)
extreme = st.one_of(ordinary, st.floats(-1e6, 1e6), st.floats(-1e-6, 1e-6))


@every_activation
@settings(deadline=None)
@given(ends=st.tuples(extreme, extreme), slope=st.floats(-2, 3), intercept=st.floats(-5, 5))
def test_sampling_never_exceeds_the_bound(
    name: str, ends: tuple[float, float], slope: float, intercept: float
) -> None:
    sigma, (lo, hi) = activation(name), sorted(ends)
    bound = max_affine_error(sigma, *(double(v) for v in (lo, hi, slope, intercept)))
    assert _dense_error(sigma, lo, hi, slope, intercept) <= float(bound)


@every_activation
@settings(deadline=None)
@given(ends=st.tuples(ordinary, ordinary), slope=st.floats(-0.2, 1.2), intercept=st.floats(-1, 1))
@example(ends=(0.0, 2.225073858507e-311), slope=0.9375, intercept=0.0)  # subnormal numbers
def test_bound_is_attained_and_bounds_the_exact_error(
    name: str, ends: tuple[float, float], slope: float, intercept: float
) -> None:
    """In 40-digit arithmetic, the error at the reported extremes is the bound to 1e−9, below it."""
    sigma, (lo, hi) = activation(name), sorted(ends)
    arguments = [double(v) for v in (lo, hi, slope)]
    bound = float(max_affine_error(sigma, *arguments, double(intercept)))
    extremes = affine_residual_extremes(sigma, *arguments)
    with mpmath.workdps(40):
        exact = max(
            abs(_exact(sigma, float(at)) - mpmath.mpf(slope) * float(at) - intercept)
            for at in (extremes.lowest_at, extremes.highest_at)
        )
        assert lo <= float(extremes.lowest_at) <= hi
        assert lo <= float(extremes.highest_at) <= hi
        assert exact <= bound
        assert bound <= exact + ATTAINED


def _exact(sigma: Activation, z: float) -> mpmath.mpf:
    z_exact = mpmath.mpf(z)
    logistic = lambda v: 1 / (1 + mpmath.exp(-v))  # noqa: E731
    cubic = 2 * mpmath.sqrt(2 / mpmath.pi) * (z_exact + mpmath.mpf(44715) / 10**6 * z_exact**3)
    return {
        "gelu": lambda: z_exact * mpmath.ncdf(z_exact),
        "gelu_tanh": lambda: z_exact * logistic(cubic),
        "quick_gelu": lambda: z_exact * logistic(mpmath.mpf(1702) / 1000 * z_exact),
        "silu": lambda: z_exact * logistic(z_exact),
        "relu": lambda: max(z_exact, mpmath.mpf(0)),
        "relu2": lambda: max(z_exact, mpmath.mpf(0)) ** 2,
    }[sigma.name]()


@every_activation
def test_infinite_ranges(name: str) -> None:
    sigma, infinity = activation(name), double(math.inf)
    zero, one = double(0.0), double(1.0)
    left = max_affine_error(sigma, -infinity, double(-1.0), zero, double(0.25))
    assert float(left) == pytest.approx(_dense_error(sigma, -60, -1, 0, 0.25), abs=1e-3)
    assert float(max_affine_error(sigma, -infinity, zero, double(1e-9), zero)) == math.inf
    right = max_affine_error(sigma, one, infinity, one, zero)
    if name == "relu2":
        assert float(right) == math.inf
    else:
        assert float(right) == pytest.approx(_dense_error(sigma, 1, 60, 1, 0), abs=1e-3)
    both = max_affine_error(sigma, -infinity, infinity, zero, zero)
    assert float(both) == math.inf


def test_relu_is_certified_free_of_error_on_either_side() -> None:
    sigma, infinity = activation("relu"), double(math.inf)
    zero, one = double(0.0), double(1.0)
    assert float(max_affine_error(sigma, -infinity, zero, zero, zero)) < 1e-12
    assert float(max_affine_error(sigma, zero, infinity, one, zero)) < 1e-12


def test_a_single_point_and_broadcasting() -> None:
    sigma = activation("silu")
    at = torch.linspace(-3, 3, 7, dtype=torch.float64)
    bound = max_affine_error(sigma, at, at, double(0.0), torch.zeros(2, 1, dtype=torch.float64))
    assert bound.shape == (2, 7)
    torch.testing.assert_close(bound, sigma(at).abs().expand(2, 7), rtol=1e-12, atol=1e-14)


def test_overflow_is_unbounded_and_not_nan() -> None:
    bound = max_affine_error(
        activation("relu2"), double(0.0), double(1e200), double(1e150), double(0.0)
    )
    assert float(bound) == math.inf


@pytest.mark.parametrize(
    ("lo", "hi", "slope", "intercept", "message"),
    [
        (1.0, 0.0, 0.5, 0.0, "empty range"),
        (math.nan, 1.0, 0.5, 0.0, "empty range"),
        (0.0, 1.0, math.inf, 0.0, "slopes must be finite"),
        (0.0, 1.0, 0.5, math.nan, "intercepts must be finite"),
    ],
)
def test_bad_arguments(lo: float, hi: float, slope: float, intercept: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_affine_error(activation("gelu"), *(double(v) for v in (lo, hi, slope, intercept)))


@every_activation
@settings(deadline=None)
@given(ends=st.tuples(ordinary, ordinary))
def test_lipschitz(name: str, ends: tuple[float, float]) -> None:
    sigma, (lo, hi) = activation(name), sorted(ends)
    z = torch.linspace(lo, hi, SAMPLES, dtype=torch.float64).clamp(lo, hi)
    steepest, bound = (
        float(sigma.derivative(z).abs().max()),
        float(lipschitz(sigma, double(lo), double(hi))),
    )
    assert steepest <= bound
    # Between samples σ' rises by at most max |σ''| (2 for the squared ReLU) times the step; a
    # kink at an end of the range counts with both of its sides.
    if not any(lo <= kink <= hi for kink in sigma.kinks):
        assert bound <= steepest + 2.5 * (hi - lo) / SAMPLES + ATTAINED


def test_sigmoid_rewrites_to_its_definition() -> None:
    z = sympy.Symbol("z", real=True)
    assert sympy.simplify(sigmoid(z).rewrite(sympy.exp) - 1 / (1 + sympy.exp(-z))) == 0
