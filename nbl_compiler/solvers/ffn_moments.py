"""Streaming second moments for the linear fits of an FFN, in memory independent of the tokens.

Two passes use the same statistics. The first regresses every hidden product z on the FFN's
input x (:class:`FFNMoments`); the second, once the kept neurons are known, regresses the FFN's
output y on x and the kept neurons' z (:class:`KeptMoments`).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from nbl_compiler.errors import CalibrationError

BLOCK_TOKENS = 1024
"""Tokens per float32 block product. The rounding of a block of b rows grows as √b · 6e-8; blocks
of 1024 keep it below 2e-6 of the product of the standard deviations, and are added in float64."""


class RegressionMoments:
    """First and second moments of (inputs u [p], targets v [q]) over a stream of tokens.

    Sums are taken about the mean of the first block, so that the covariance does not lose digits
    to a large mean. Products of a block are taken in float32 (float64 for float64 activations)
    and accumulated in float64. Merging is commutative and associative up to float64 rounding.

    Args:
        inputs: p, the number of regressors.
        targets: q, the number of outputs.
        name: What the error messages call the place where the activations were seen.
    """

    def __init__(self, inputs: int, targets: int, *, name: str = "FFN") -> None:
        self.inputs = inputs
        self.targets = targets
        self.name = name
        self.count = 0
        self._allocate(torch.device("cpu"))

    def _allocate(self, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._input_shift, self._target_shift = zeros(self.inputs), zeros(self.targets)
        self._input_sum, self._target_sum = zeros(self.inputs), zeros(self.targets)
        self._input_products = zeros(self.inputs, self.inputs)
        self._cross_products = zeros(self.targets, self.inputs)
        self._target_squares = zeros(self.targets)

    def observe(self, inputs: Tensor, targets: Tensor) -> None:
        """Add tokens: ``inputs`` [..., p] and ``targets`` [..., q], any floating dtype.

        The moments live on the device of the first tokens.

        Raises:
            CalibrationError: if an activation is NaN or infinite; nothing is added then.
        """
        inputs = inputs.detach().reshape(-1, self.inputs)
        targets = targets.detach().reshape(-1, self.targets)
        if inputs.shape[0] != targets.shape[0]:
            raise ValueError(f"{inputs.shape[0]} input tokens but {targets.shape[0]} target tokens")
        for what, tensor in (("inputs", inputs), ("outputs", targets)):
            if not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"{self.name}: NaN or infinite {what} during calibration; run the model in a "
                    "wider dtype (float32 or bfloat16) or drop the text that causes it"
                )
        if inputs.shape[0] == 0:
            return
        if self.count == 0:
            self._start(inputs[:BLOCK_TOKENS], targets[:BLOCK_TOKENS])
        for block in range(0, inputs.shape[0], BLOCK_TOKENS):
            rows = slice(block, block + BLOCK_TOKENS)
            self._add_block(inputs[rows], targets[rows])

    def _start(self, inputs: Tensor, targets: Tensor) -> None:
        self._allocate(inputs.device)
        self._input_shift = inputs.double().mean(0)
        self._target_shift = targets.double().mean(0)

    def _add_block(self, inputs: Tensor, targets: Tensor) -> None:
        product_dtype = torch.promote_types(
            torch.float32, torch.promote_types(inputs.dtype, targets.dtype)
        )
        u = (inputs.double() - self._input_shift).to(product_dtype)
        v = (targets.double() - self._target_shift).to(product_dtype)
        self.count += u.shape[0]
        self._input_sum += u.sum(0, dtype=torch.float64)
        self._target_sum += v.sum(0, dtype=torch.float64)
        self._input_products += (u.T @ u).double()
        self._cross_products += (v.T @ u).double()
        self._target_squares += v.double().square().sum(0)

    def merge(self, other: RegressionMoments) -> Self:
        """The moments of both streams together; neither operand changes.

        Raises:
            ValueError: if the two count different regressors or outputs.
        """
        if (self.inputs, self.targets) != (other.inputs, other.targets):
            raise ValueError("only moments of the same inputs and targets can be merged")
        if self.count == 0 and other.count > 0:
            return self._combine(other, self)
        return self._combine(self, other)

    def _combine(self, base: RegressionMoments, added: RegressionMoments) -> Self:
        merged = self._empty()
        device = base._input_shift.device
        merged.count = base.count + added.count
        du = added._input_shift.to(device) - base._input_shift
        dv = added._target_shift.to(device) - base._target_shift
        su, sv = added._input_sum.to(device), added._target_sum.to(device)
        n = added.count
        merged._input_shift, merged._target_shift = base._input_shift, base._target_shift
        merged._input_sum = base._input_sum + su + n * du
        merged._target_sum = base._target_sum + sv + n * dv
        cross = torch.outer(su, du)
        merged._input_products = (
            base._input_products
            + added._input_products.to(device)
            + (cross + cross.T + n * torch.outer(du, du))
        )
        merged._cross_products = (
            base._cross_products
            + added._cross_products.to(device)
            + (torch.outer(sv, du) + torch.outer(dv, su) + n * torch.outer(dv, du))
        )
        merged._target_squares = (
            base._target_squares
            + added._target_squares.to(device)
            + (2 * sv * dv + n * dv.square())
        )
        return merged

    def about(self, input_shift: Tensor, target_shift: Tensor) -> Self:
        """The same moments with their sums taken about other points ([p] and [q] float64)."""
        origin = self._empty()
        origin.count = 0
        origin._allocate(self._input_shift.device)
        origin._input_shift = input_shift.to(self._input_shift)
        origin._target_shift = target_shift.to(self._target_shift)
        return self._combine(origin, self)

    def of_targets(self, chosen: slice) -> Self:
        """The moments of some of the targets only."""
        part = self._empty()
        part.targets = len(range(*chosen.indices(self.targets)))
        part._target_shift, part._target_sum = self._target_shift[chosen], self._target_sum[chosen]
        part._cross_products = self._cross_products[chosen]
        part._target_squares = self._target_squares[chosen]
        return part

    def sums(self) -> tuple[Tensor, ...]:
        """The sums that add up when moments about the same points are merged."""
        return (
            self._input_sum, self._target_sum, self._input_products, self._cross_products,
            self._target_squares,
        )  # fmt: skip

    def _empty(self) -> Self:
        fresh = object.__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        return fresh

    def _require_tokens(self) -> int:
        if self.count == 0:
            raise CalibrationError(f"{self.name}: no calibration token reached this FFN")
        return self.count

    @property
    def input_mean(self) -> Tensor:
        """E[u], [p] float64."""
        return self._input_shift + self._input_sum / self._require_tokens()

    @property
    def target_mean(self) -> Tensor:
        """E[v], [q] float64."""
        return self._target_shift + self._target_sum / self._require_tokens()

    @property
    def input_covariance(self) -> Tensor:
        """C_uu, [p, p] float64, normalised by n."""
        n = self._require_tokens()
        covariance = self._input_products / n - torch.outer(self._input_sum, self._input_sum) / n**2
        return (covariance + covariance.T) / 2

    @property
    def cross_covariance(self) -> Tensor:
        """C_vu, [q, p] float64, normalised by n."""
        n = self._require_tokens()
        return self._cross_products / n - torch.outer(self._target_sum, self._input_sum) / n**2

    @property
    def target_variance(self) -> Tensor:
        """Var[v], [q] float64, normalised by n."""
        n = self._require_tokens()
        return (self._target_squares / n - (self._target_sum / n).square()).clamp_min(0)


class FFNMoments(RegressionMoments):
    """Moments of an FFN's input x [d] and hidden product z [f] (n, Σx, Σz, C_xx, C_zx, Σz²).

    z is what the down projection reads: σ(W1 x + b1), or act(gate(x)) · up(x).
    """

    def __init__(self, model_size: int, hidden_size: int, *, name: str = "FFN") -> None:
        super().__init__(model_size, hidden_size, name=name)


class KeptMoments(RegressionMoments):
    """Moments of the regressors (x, z_K) and the FFN's output y, for a chosen set K of neurons.

    Everything that depends on the joint distribution of the kept neurons follows from them: the
    joint refit and the train or held-out NMSE of any y ≈ M x + V z_K + b.

    Args:
        model_size: d, size of x.
        kept: Indices of the kept neurons, [k] int64.
        output_size: o, size of y.
        name: As in :class:`RegressionMoments`.
    """

    def __init__(
        self, model_size: int, kept: Tensor, output_size: int, *, name: str = "FFN"
    ) -> None:
        super().__init__(model_size + kept.numel(), output_size, name=name)
        self.model_size = model_size
        self.kept = kept

    def observe_ffn(self, x: Tensor, hidden: Tensor, output: Tensor) -> None:
        """Add tokens: ``x`` [..., d], ``hidden`` [..., f] (all neurons), ``output`` [..., o].

        Raises:
            CalibrationError: as :meth:`RegressionMoments.observe`.
        """
        kept_hidden = hidden.index_select(-1, self.kept.to(hidden.device))
        self.observe(torch.cat([x, kept_hidden.to(x.dtype)], dim=-1), output)

    def merge(self, other: RegressionMoments) -> Self:
        """As :meth:`RegressionMoments.merge`; the kept neurons must be the same."""
        if not isinstance(other, KeptMoments) or not torch.equal(self.kept, other.kept):
            raise ValueError("only moments of the same kept neurons can be merged")
        return super().merge(other)
