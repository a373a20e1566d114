"""How far a model with replaced sites is from what the dense model says.

    disturbance = mean over positions of  Σ_v p(v) (log p(v) − log q(v)),   p dense, q with maps

For a model that predicts no tokens it is the relative squared error of its main output instead,
Σ‖q − p‖² / Σ‖p − p̄‖².
"""

from __future__ import annotations

from torch import Tensor, linalg


class Distributions:
    """What the dense model predicts.

    Of other predictions only Σ_v p_v logits_v and log Σ_v exp logits_v are needed: fewer passes
    over tensors of the vocabulary's size, the widest there are, than their log-probabilities take.

    Args:
        logits: [n, V], float32.
    """

    def __init__(self, logits: Tensor) -> None:
        self._p = logits.softmax(-1)
        self._own = self._likelihood(logits)

    def compared_with(self, logits: Tensor) -> tuple[float, float]:
        """Return Σ p (log p − log q) over all positions, in nats, and the number of positions."""
        divergence = float((self._own - self._likelihood(logits)).sum())
        return max(divergence, 0.0), float(len(logits))  # rounding may leave less than nothing

    def _likelihood(self, logits: Tensor) -> Tensor:
        """Return Σ_v p_v log q_v of each position, [n], float64."""
        expected: Tensor = linalg.vecdot(self._p, logits)
        return expected.double() - logits.logsumexp(-1).double()


class Outputs:
    """What the dense model returns, if that is no prediction of tokens.

    Args:
        rows: [n, d], float32.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._variation = float((rows - rows.mean(0)).double().square().sum())

    def compared_with(self, rows: Tensor) -> tuple[float, float]:
        """Return the squared error of other rows, and the variation of these."""
        return float((rows - self._rows).double().square().sum()), self._variation


Said = Distributions | Outputs
