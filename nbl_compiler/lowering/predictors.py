"""Predictors of FFN pre-activations: a low-rank map, and a quantized copy of the weights.

A predictor is cheap to read and guesses z = W x + b for all n rows of W. For a plain FFN the rows
are the f rows of W1; for a gated FFN they are the f rows of the gate followed by the f rows of up.
The guarded op gets a predictor as a kind and a list of tensors (its schema knows only tensors), so
:func:`predict` is a function of those.

The quantized predictor also comes in a certified form: it carries, per row, a bound on what
rounding W can change, so that a range test widened by it misses no neuron, whatever the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.errors import ConfigError

PredictorKind = Literal["none", "low_rank", "quantized_2", "quantized_4", "quantized_8"]
BITS_OF_KIND: dict[str, int] = {"quantized_2": 2, "quantized_4": 4, "quantized_8": 8}
PREDICTOR_KINDS: tuple[str, ...] = ("none", "low_rank", *BITS_OF_KIND)

_CERTIFICATE_TENSORS = 3
"""The certified form appends radius, rounding and centre to the predictor's tensors."""

NORM_SLACK = 1.0 + 2.0**-10
"""Norms of x are computed in float32; their relative error, at most d·2^−24, stays below this for
every d up to 16,384."""


class Prediction(NamedTuple):
    """Predicted pre-activations.

    Args:
        value: ẑ [tokens, n].
        slack: Bound on |ẑ − z| [tokens, n], or None where none is certified.
    """

    value: Tensor
    slack: Tensor | None


@dataclass(frozen=True)
class LowRankPredictor:
    """ẑ = coefficients (basis x) + offset.

    Args:
        basis: [r, d].
        coefficients: [n, r].
        offset: [n] float32.
    """

    basis: Tensor
    coefficients: Tensor
    offset: Tensor

    @property
    def kind(self) -> PredictorKind:
        """The op's name for this predictor."""
        return "low_rank"

    @property
    def tensors(self) -> list[Tensor]:
        """The op's tensors for this predictor."""
        return [self.basis, self.coefficients, self.offset]

    @property
    def bytes(self) -> int:
        """Bytes read to predict one token."""
        return tensor_bytes(self.tensors)

    def __call__(self, x: Tensor) -> Prediction:
        """Predict for ``x`` [..., d]; the value is [tokens, n]."""
        return predict(self.kind, self.tensors, x)


@dataclass(frozen=True)
class QuantizedPredictor:
    """ẑ_i = scale_i Σ_j codes_ij x_j + shift_i Σ_j x_j + offset_i.

    Args:
        bits: 2, 4 or 8.
        codes: uint8 [n, ceil(d / (8 / bits))]: code of column j in bits
            ``bits * (j // width)`` and up of byte ``j % width`` (planar, so that unpacking is a
            shift of a whole row).
        scale: [n] float32.
        shift: [n] float32, −scale · zero point.
        offset: [n] float32, the bias, plus what rounding takes off the mean pre-activation.
        certificate: None, or (radius [n], rounding [n], centre [d]), all float32, with
            |ẑ_i − z_i| ≤ radius_i ‖x − centre‖₂ + rounding_i (‖x‖₂ + 1) for every x.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    shift: Tensor
    offset: Tensor
    certificate: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def kind(self) -> PredictorKind:
        """The op's name for this predictor."""
        return next(
            k for k in ("quantized_2", "quantized_4", "quantized_8") if k[-1] == str(self.bits)
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The op's tensors for this predictor."""
        return [self.codes, self.scale, self.shift, self.offset, *(self.certificate or ())]

    @property
    def bytes(self) -> int:
        """Bytes read to predict one token."""
        return tensor_bytes(self.tensors)

    def __call__(self, x: Tensor) -> Prediction:
        """Predict for ``x`` [..., d]; the value is [tokens, n]."""
        return predict(self.kind, self.tensors, x)


def predict(kind: str, tensors: Sequence[Tensor], x: Tensor) -> Prediction:
    """Predict pre-activations in the dtype of ``x`` [tokens, d]; the meaning of every predictor.

    Raises:
        ConfigError: for an unknown kind.
    """
    x = x.reshape(-1, x.shape[-1])
    if kind == "low_rank":
        basis, coefficients, offset = (t.to(x.dtype) for t in tensors)
        return Prediction(F.linear(F.linear(x, basis), coefficients, offset), None)
    if kind not in BITS_OF_KIND:
        raise ConfigError(f"predictor {kind!r} must be one of {', '.join(PREDICTOR_KINDS)}")
    codes, scale, shift, offset = tensors[:4]
    unpacked = unpack(codes, BITS_OF_KIND[kind], x.shape[-1]).to(x.dtype)
    value = F.linear(x, unpacked) * scale + x.sum(-1, keepdim=True) * shift + offset
    return Prediction(value.to(x.dtype), certified_slack(tensors, x))


def certified_slack(tensors: Sequence[Tensor], x: Tensor) -> Tensor | None:
    """Return the certificate's bound on |ẑ − z| [tokens, n], or None without a certificate."""
    if len(tensors) < 4 + _CERTIFICATE_TENSORS:
        return None
    radius, rounding, centre = tensors[4:]
    distance = (x - centre).square().sum(-1, keepdim=True).sqrt() * NORM_SLACK
    norm = x.square().sum(-1, keepdim=True).sqrt() * NORM_SLACK
    return distance * radius + (norm + 1.0) * rounding


def fit_low_rank(
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    covariance: Tensor | None = None,
    mean: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> LowRankPredictor:
    """Return the rank-``rank`` predictor with the least mean squared error over the inputs.

    With x ~ (mean, covariance) that is the truncated singular value decomposition of
    W covariance^(1/2) (Eckart–Young); without a covariance, that of W.

    Args:
        weight: W [n, d].
        bias: b [n], or None.
        rank: 1 … d.
        covariance: Covariance of x [d, d]; directions in which x does not vary are left out.
        mean: Mean of x [d].
        dtype: Dtype of the two factors.

    Raises:
        ConfigError: if the rank is outside 1 … d.
    """
    rows, width = weight.shape
    if not 1 <= rank <= width:
        raise ConfigError(f"a low-rank predictor needs a rank from 1 to {width}, not {rank}")
    exact = weight.double()
    if covariance is None:
        _, _, right = torch.linalg.svd(exact, full_matrices=False)
        basis = right[:rank]
        coefficients = exact @ basis.T
    else:
        eigenvalues, vectors = torch.linalg.eigh(covariance.double())
        floor = eigenvalues.clamp_min(eigenvalues.max() * _RELATIVE_EIGENVALUE_FLOOR).sqrt()
        left, singular, right = torch.linalg.svd(exact @ vectors * floor, full_matrices=False)
        coefficients = left[:, :rank] * singular[:rank]
        basis = right[:rank] / floor @ vectors.T
    centre = weight.new_zeros(width, dtype=torch.float64) if mean is None else mean.double()
    basis, coefficients = basis.to(dtype), coefficients.to(dtype)
    missing = exact @ centre - coefficients.double() @ (basis.double() @ centre)
    offset = missing if bias is None else missing + bias.double()
    return LowRankPredictor(
        basis.contiguous(), coefficients.contiguous(), offset.float().expand(rows).contiguous()
    )


_RELATIVE_EIGENVALUE_FLOOR = 1e-10
"""Directions of x with less than this share of the largest variance count as constant; below it
float64 eigenvalues of a float32 covariance are noise."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [n, d] below 2^bits into uint8 [n, ceil(d / (8 / bits))], planar."""
    planes = 8 // bits
    width = -(-codes.shape[1] // planes)
    padded = F.pad(codes, (0, planes * width - codes.shape[1])).reshape(-1, planes, width)
    packed = torch.zeros_like(padded[:, 0])
    for plane in range(planes):
        packed |= padded[:, plane] << (bits * plane)
    return packed.contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack`: codes uint8 [n, width]."""
    planes = [(packed >> (bits * plane)) & (2**bits - 1) for plane in range(8 // bits)]
    return torch.cat(planes, dim=1)[:, :width]


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors)
