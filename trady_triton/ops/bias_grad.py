"""Gradient of a bias: the sum of dy over tokens.

A sum is one pass over dy at the speed of memory, and torch's own is that already (and repeatable), so there is no
kernel here. Where the weight gradient of the same layer is taken too, `token_wgrad(..., ones_row=True)` gives the bias
gradient without reading dy a second time.
"""

from __future__ import annotations

import torch


def bias_grad(dy: torch.Tensor, channel_dim: int = -1, *, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[O] for dy [..., O] (channel_dim -1) or [N, O, P, Q] (1), accumulated in fp32 (fp64 for fp64)."""
    axis = channel_dim % dy.dim()
    others = [dim for dim in range(dy.dim()) if dim != axis]
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.sum(others, dtype=dtype).to(out_dtype) if others else dy.to(out_dtype)
