"""Whether calibration runs in several processes."""

from __future__ import annotations

import torch.distributed as dist


def several_processes() -> bool:
    """Tell whether this is one process of a ``torch.distributed`` job of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
