"""Small tables on their way to a device, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor


def upload(values: torch.Tensor | Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, nested or as a tensor, as a tensor on `device`.

    From the CPU to CUDA through page-locked memory, which torch keeps until the copy is done: from any other the driver
    may first wait for all work on the stream.
    """
    found = torch.as_tensor(values, dtype=dtype)
    if found.device.type == "cpu" and device.type == "cuda":
        found = page_locked(found)
    return found.to(device, non_blocking=True)


def page_locked(x: torch.Tensor) -> torch.Tensor:
    """x in page-locked memory; a fake tensor, which has none, as it is."""
    return x if isinstance(x, FakeTensor) else x.pin_memory()
