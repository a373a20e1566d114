"""Errors a user can cause, one class per kind of mistake.

Every message names the site or file concerned and says what to do about it.
"""

from __future__ import annotations


class NBLError(Exception):
    """Base class of every error raised on purpose by nbl_compiler.

    Attributes:
        told_by: In a ``torch.distributed`` job whose processes all end with an error, the process
            that tells of it; None if each has its own.
    """

    told_by: int | None = None


class ConfigError(NBLError, ValueError):
    """An option is out of range, contradictory, or names something that does not exist."""


class PlanFormatError(NBLError, ValueError):
    """A plan file is truncated, edited, or of a version that this release cannot read."""


class PlanMismatchError(NBLError, ValueError):
    """The plan was calibrated on another model, or on other weights of this model."""


class CalibrationError(NBLError, ValueError):
    """The calibration data cannot support a fit (too few tokens, NaN/Inf, no site seen)."""


class UnsupportedDtypeError(NBLError, TypeError):
    """A tensor has a dtype that the rewrite or the calibration does not support."""


class InferenceOnlyError(NBLError, RuntimeError):
    """Gradients or training mode were requested of a rewrite that exists for inference."""


class StrictError(NBLError, RuntimeError):
    """``strict=True`` was asked for, and a site of the plan could not be rewritten."""


class CacheMismatchError(NBLError, RuntimeError):
    """A cache built by ``nbl.cache`` was used by a model that does not run its plan."""


class WeightsReleasedError(NBLError, RuntimeError):
    """Weights are needed that ``nbl.release`` let go of."""


class ToolchainError(NBLError, RuntimeError):
    """Something that lowering needs is missing from the machine (a C++ compiler, say)."""


class NBLWarning(UserWarning):
    """Something works, but not as the user may expect."""
