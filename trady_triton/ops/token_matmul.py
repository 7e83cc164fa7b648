"""The sum over tokens of a product, by matrix products of torch in parts that keep temporaries small.

N batches, P tokens of a batch, K rows, O out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trady_triton.ops.select_config import MAX_WORKSPACE_BYTES


def token_matmul(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Sum over n of x[n] @ dy[n] for x [N, K, P], dy [N, P, O]: [K, O], accumulated in fp32 (fp64 for fp64).

    Both may be views at any stride. Nothing of the size of dy is copied, but where P is so small that a copy is much
    smaller than the N products [K, O], which one product over all tokens then replaces.
    """
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    N, K, P = x.shape
    if N > 1 and 4 * P <= K and dy.numel() * dy.itemsize <= MAX_WORKSPACE_BYTES:
        x, dy = x.transpose(0, 1).reshape(1, K, N * P), dy.reshape(1, N * P, dy.shape[2])
    size = _part_size(x, dy.shape[2], upcast=dy.dtype != dtype and not dy.is_cuda)
    if size >= (x.shape[2] if x.shape[0] == 1 else x.shape[0]):
        return _product(x, dy, dtype)
    out = torch.zeros(x.shape[1], dy.shape[2], dtype=dtype, device=dy.device)
    for x_part, dy_part in _parts(x, dy, size):
        out += _product(x_part, dy_part, dtype)
    return out


def _part_size(x: torch.Tensor, O: int, upcast: bool) -> int:
    """How many tokens (one batch) or batches to multiply at once, so that temporaries stay within 8 MiB."""
    N, K, P = x.shape
    if N == 1:
        return max(1, MAX_WORKSPACE_BYTES // (4 * max(1, K + O))) if upcast else P
    return max(1, MAX_WORKSPACE_BYTES // (4 * max(1, K * O + (P * (K + O) if upcast else 0))))


def _parts(x: torch.Tensor, dy: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    x_dim, dy_dim = (2, 1) if x.shape[0] == 1 else (0, 0)
    return zip(x.split(size, x_dim), dy.split(size, dy_dim), strict=True)


def _product(x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype != dtype and x.is_cuda:  # operands as they are, only the result is wide
        return torch.bmm(x, dy, dtype).sum(0) if len(x) != 1 else torch.mm(x[0], dy[0], dtype)
    x, dy = x.to(dtype), dy.to(dtype)
    return torch.bmm(x, dy).sum(0) if len(x) != 1 else torch.mm(x[0], dy[0])
