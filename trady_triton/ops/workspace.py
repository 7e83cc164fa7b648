"""The scratch memory of two-pass ops, at most 8 MiB each.

It comes from torch's allocator and goes back when the op returns, so the next op on the stream gets the same block. A
buffer kept here would need an owner for every stream and thread, and CUDA graphs would go on using it after it was
freed: an allocation in a capture belongs to the graph.
"""

from __future__ import annotations

import torch

from trady_triton.ops.select_config import MAX_WORKSPACE_BYTES


def workspace(device: torch.device, numel: int) -> torch.Tensor:
    """An uninitialised fp32 vector [numel].

    Raises: ValueError above 8 MiB; a configuration has to split less instead.
    """
    if 4 * numel > MAX_WORKSPACE_BYTES:
        raise ValueError(f"workspace: got {4 * numel} bytes, wanted at most {MAX_WORKSPACE_BYTES}")
    return torch.empty(numel, dtype=torch.float32, device=device)
