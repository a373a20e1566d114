"""Streaming second moments of (input, output, stream) rows: a commutative monoid.

For every site three kinds of row are seen: the map's input x [d], the attention output y [d_out]
and the updated residual stream t = y + r [d_out], of which the CCA bound is made. Products are
taken in float32 blocks, shifted by the first block's mean so that nothing cancels, and added up
in float64. Memory does not depend on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nbl_compiler.errors import CalibrationError
from nbl_compiler.solvers.precision import full_precision


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
        x, y, t = (rows.to(torch.float32, copy=True) for rows in (x, y, stream))
        self._absorb(x, y, t.add_(y)[:, : self.shift_t.numel()])

    def _absorb(self, x: Tensor, y: Tensor, t: Tensor) -> None:
        """Add float32 rows of x, y and t, and overwrite them."""
        if x.shape[0] == 0:
            return
        if self.count == 0:
            self.shift_x, self.shift_y, self.shift_t = (r.mean(0).double() for r in (x, y, t))
        shifts = [s.float() for s in (self.shift_x, self.shift_y, self.shift_t)]
        if self.count:
            self._rebase(*(s.double() for s in shifts))  # what is subtracted below, to the bit
        for rows, shift in zip((x, y, t), shifts, strict=True):
            rows.sub_(shift)
        sums = [rows.sum(0, dtype=torch.float64) for rows in (x, y, t)]
        with full_precision(x.device):
            products = (x.T @ x, y.T @ x, t.T @ x, t.T @ t)
        # Squares overflow first, so the diagonal vouches for everything else.
        probe = torch.cat([*sums, products[0].diagonal(), products[3].diagonal()])
        if not bool(torch.isfinite(probe).all()):
            raise CalibrationError("activations hold NaN or infinity")
        self.count += x.shape[0]
        self.sum_x += sums[0]
        self.sum_y += sums[1]
        self.sum_t += sums[2]
        for total, product in zip((self.xx, self.yx, self.tx, self.tt), products, strict=True):
            total += product
        self.yy += y.square_().sum(0, dtype=torch.float64)

    def _rebase(self, shift_x: Tensor, shift_y: Tensor, shift_t: Tensor) -> None:
        """Take the sums about other points, in place; free where nothing changes."""
        new = (shift_x, shift_y, shift_t)
        old = (self.shift_x, self.shift_y, self.shift_t)
        if all(torch.equal(a, b) for a, b in zip(new, old, strict=True)):
            return
        moved = self.about(*new)
        for part in fields(self):
            setattr(self, part.name, getattr(moved, part.name))

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

    def of_inputs(self, chosen: Tensor) -> Moments:
        """Return the moments of some components of x only.

        Args:
            chosen: Their indices, [k].
        """
        return replace(
            self,
            shift_x=self.shift_x[chosen],
            sum_x=self.sum_x[chosen],
            xx=self.xx[chosen][:, chosen],
            yx=self.yx[:, chosen],
            tx=self.tx[:, chosen],
        )

    def residual(self, weight: Tensor) -> Moments:
        """Return the moments of (x, y − weight x); what is known of t is left as it is.

        Args:
            weight: [d_out, d].
        """
        explained = weight @ self.xx
        return replace(
            self,
            shift_y=self.shift_y - weight @ self.shift_x,
            sum_y=self.sum_y - weight @ self.sum_x,
            yx=self.yx - explained,
            yy=self.yy - 2 * (weight * self.yx).sum(1) + (weight * explained).sum(1),
        )

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
    return Moments(shift_x=first.shift_x, shift_y=first.shift_y, shift_t=first.shift_t, **summed)


# Rows a block: enough to make the float64 update of a d × d matrix cheap beside the product.
BLOCK_ROWS = 1024
BLOCK_ROWS_WITHOUT_STREAM = 256


class BufferedMoments:
    """Collects rows into blocks of a fixed size and adds whole blocks to ``Moments``.

    Small batches would otherwise pay a float64 update of the whole d × d matrix each. Rows are
    copied, so the model may overwrite its activations, and blocks end at the same rows however
    the stream was cut, so the sums are the same to the bit.
    """

    def __init__(
        self, inputs: int, outputs: int, device: torch.device, *, stream: bool = True
    ) -> None:
        self.moments = Moments.zeros(inputs, outputs, device, stream=stream)
        size = BLOCK_ROWS if stream else BLOCK_ROWS_WITHOUT_STREAM
        widths = (inputs, outputs, self.moments.shift_t.numel())
        self._block = [
            torch.empty(size, width, dtype=torch.float32, device=device) for width in widths
        ]
        self._filled, self._size = 0, size

    def add(self, x: Tensor, y: Tensor, stream: Tensor) -> None:
        """Add rows (see ``Moments.add``)."""
        block_x, block_y, block_t = self._block
        start = 0
        while start < x.shape[0]:
            take = min(self._size - self._filled, x.shape[0] - start)
            into = slice(self._filled, self._filled + take)
            rows = slice(start, start + take)
            block_x[into].copy_(x[rows])
            block_y[into].copy_(y[rows])
            if block_t.shape[1]:
                block_t[into].copy_(stream[rows]).add_(block_y[into])
            self._filled += take
            start += take
            if self._filled == self._size:
                self.flush()

    def flush(self) -> Moments:
        """Add what is pending and return the moments."""
        pending, self._filled = self._filled, 0
        self.moments._absorb(*(rows[:pending] for rows in self._block))
        return self.moments

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.moments.nbytes + sum(rows.nbytes for rows in self._block)
