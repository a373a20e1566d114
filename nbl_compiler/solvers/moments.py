"""Streaming second moments of (input, output, stream) rows: a commutative monoid.

For every site three kinds of row are seen: the map's input x [d], the attention output y [d_out]
and the updated residual stream t = y + r [d_out], of which the CCA bound is made. Products are
taken in float32 blocks, shifted by the first block's mean so that nothing cancels, and added up
in float64. Memory does not depend on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nbl_compiler.errors import CalibrationError


@dataclass
class Moments:
    """Sums over rows, taken about ``shift_*`` (float64).

    Args:
        count: Number of rows.
        shift_x, shift_y, shift_t: Points about which the sums are taken, [d] and [d_out].
        sum_x, sum_y, sum_t: Sums of the shifted rows.
        xx, yx, tx, tt: Sums of outer products of shifted rows: [d, d], [d_out, d], [d_out, d],
            [d_out, d_out].
        yy: Sum of squares of the shifted y, per component, [d_out].
    """

    count: int
    shift_x: Tensor
    shift_y: Tensor
    shift_t: Tensor
    sum_x: Tensor
    sum_y: Tensor
    sum_t: Tensor
    xx: Tensor
    yx: Tensor
    tx: Tensor
    tt: Tensor
    yy: Tensor

    @classmethod
    def zeros(
        cls, inputs: int, outputs: int, device: torch.device | str = "cpu", *, stream: bool = True
    ) -> Moments:
        """Return the neutral element for x of width ``inputs`` and y of width ``outputs``.

        Without ``stream`` nothing is kept of t (its tensors have width 0): held-out rows report
        the error of the map, which does not need it.
        """
        width_t = outputs if stream else 0

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            0, zero(inputs), zero(outputs), zero(width_t), zero(inputs), zero(outputs),
            zero(width_t), zero(inputs, inputs), zero(outputs, inputs), zero(width_t, inputs),
            zero(width_t, width_t), zero(outputs),
        )  # fmt: skip

    def add(self, x: Tensor, y: Tensor, stream: Tensor) -> None:
        """Add rows in place.

        Args:
            x: Inputs, [n, d], any floating dtype.
            y: Outputs, [n, d_out].
            stream: Residual stream before y is added, [n, d_out].

        Raises:
            CalibrationError: if a row holds NaN or infinity.
        """
        if x.shape[0] == 0:
            return
        x, y = x.float(), y.float()
        t = (y + stream.float())[:, : self.shift_t.numel()]
        if self.count == 0:
            self.shift_x, self.shift_y = x.mean(0).double(), y.mean(0).double()
            self.shift_t = t.mean(0).double()
        x, y, t = x - self.shift_x.float(), y - self.shift_y.float(), t - self.shift_t.float()
        # The float32 shift is what was really subtracted; keep that one.
        self.shift_x, self.shift_y = self.shift_x.float().double(), self.shift_y.float().double()
        self.shift_t = self.shift_t.float().double()
        sums = (x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64))
        if not all(bool(torch.isfinite(s).all()) for s in sums):
            raise CalibrationError("activations hold NaN or infinity")
        self.count += x.shape[0]
        self.sum_x += sums[0]
        self.sum_y += sums[1]
        self.sum_t += t.sum(0, dtype=torch.float64)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.tx += t.T @ x
        self.tt += t.T @ t
        self.yy += y.square().sum(0, dtype=torch.float64)

    def about(self, shift_x: Tensor, shift_y: Tensor, shift_t: Tensor) -> Moments:
        """Return the same moments taken about other points."""
        n, dx, dy = self.count, self.shift_x - shift_x, self.shift_y - shift_y
        dt = self.shift_t - shift_t

        def cross(product: Tensor, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
            return product + torch.outer(a, db) + torch.outer(da, b) + n * torch.outer(da, db)

        return Moments(
            n, shift_x, shift_y, shift_t,
            self.sum_x + n * dx, self.sum_y + n * dy, self.sum_t + n * dt,
            cross(self.xx, self.sum_x, dx, self.sum_x, dx),
            cross(self.yx, self.sum_y, dy, self.sum_x, dx),
            cross(self.tx, self.sum_t, dt, self.sum_x, dx),
            cross(self.tt, self.sum_t, dt, self.sum_t, dt),
            self.yy + 2 * self.sum_y * dy + n * dy.square(),
        )  # fmt: skip

    def centred(self) -> Moments:
        """Return the moments about their own means."""
        if self.count == 0:
            return self
        means = (self.mean_x, self.mean_y, self.shift_t + self.sum_t / self.count)
        return self.about(*means)

    @property
    def mean_x(self) -> Tensor:
        """Mean of x, [d]."""
        return self.shift_x + self.sum_x / max(self.count, 1)

    @property
    def mean_y(self) -> Tensor:
        """Mean of y, [d_out]."""
        return self.shift_y + self.sum_y / max(self.count, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def merge(first: Moments, second: Moments) -> Moments:
    """Return the moments of both row sets together; commutative and associative to rounding."""
    if first.count == 0:
        return second
    other = second.about(first.shift_x, first.shift_y, first.shift_t)
    summed = {
        f.name: getattr(first, f.name) + getattr(other, f.name)
        for f in fields(Moments)
        if not f.name.startswith("shift")
    }
    return Moments(
        shift_x=first.shift_x, shift_y=first.shift_y, shift_t=first.shift_t, **summed
    )


class BufferedMoments:
    """Collects rows until a block is worth a matrix product, then adds it to ``Moments``.

    Small batches would otherwise pay a float64 update of the whole d × d matrix each.
    """

    def __init__(
        self, inputs: int, outputs: int, device: torch.device, *, stream: bool = True
    ) -> None:
        self.moments = Moments.zeros(inputs, outputs, device, stream=stream)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._pending = 0
        self._block = max(1024, inputs)

    def add(self, x: Tensor, y: Tensor, stream: Tensor) -> None:
        """Add rows (see ``Moments.add``)."""
        self._rows.append((x, y, stream))
        self._pending += x.shape[0]
        if self._pending >= self._block:
            self.flush()

    def flush(self) -> Moments:
        """Add what is pending and return the moments."""
        if self._rows:
            x, y, stream = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
            self._rows.clear()
            self._pending = 0
            self.moments.add(x, y, stream)
        return self.moments
