"""Weight gradient of a convolution with groups = 1 from the store that a budget counts: planes [K, N, H, W].

N images, K selected channels, O out, H x W input pixels, P x Q output pixels, R x S taps.   The kernel of conv_wgrad.py
wants channels innermost, rounded up to 8. What waits for the backward must not pay for that, so the store is turned
here, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trady_triton.ops.conv_geometry import check_pair
from trady_triton.ops.conv_wgrad import conv_config, conv_wgrad_impl, dense_wgrad
from trady_triton.ops.dispatch import takes_library, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.store import store_channels


def planes_wgrad_ref(
    store: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """What `planes_wgrad` computes, by torch's convolution backward on the compact data."""
    return dense_wgrad(store.transpose(0, 1), dy, kernel_size, stride, padding, dilation, out_dtype)


def _impl(
    store: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    geometry = (kernel_size, stride, padding, dilation)
    K = store.shape[0]
    empty = store.numel() == 0 or dy.numel() == 0
    if empty or not use_triton(store) or takes_library(conv_config(dy, K, kernel_size)):
        return planes_wgrad_ref(store, dy, *geometry, out_dtype)
    taps = store_channels(store.transpose(0, 1), torch.arange(K, device=store.device), "taps")
    return conv_wgrad_impl(taps, dy, K, *geometry, out_dtype)


def _fake(
    store: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return dy.new_empty(store.shape[0], dy.shape[1], *kernel_size, dtype=out_dtype)


def planes_wgrad_flops(
    store_shape: torch.Size, dy_shape: torch.Size, kernel_size: Sequence[int], *_: Any, **__: Any
) -> int:
    """2 N P Q R S K O."""
    return 2 * dy_shape.numel() * kernel_size[0] * kernel_size[1] * store_shape[0]


def planes_wgrad_bytes(
    store_shape: Sequence[int], dy_shape: Sequence[int], taps: int, itemsize: int, out_itemsize: int = 4
) -> int:
    """Bytes that a perfect kernel moves: the store and dy [N, O, P, Q] read once, the result written."""
    (K, N, H, W), (_, O, P, Q) = store_shape, dy_shape
    return itemsize * N * (K * H * W + O * P * Q) + out_itemsize * K * O * taps


_op = register_op(
    "planes_wgrad(Tensor store, Tensor dy, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "ScalarType out_dtype) -> Tensor",
    _impl,
    _fake,
    planes_wgrad_flops,
)


def planes_wgrad(
    store: torch.Tensor,
    dy: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Compact weight gradient [K, O, R, S] in `out_dtype` of a convolution, accumulated in fp32.

    store: [K, N, H, W] ("planes" of store_channels) of dy's dtype; dy: [N, O, P, Q] in any memory format. `padding` is
    top and left, as for `conv_wgrad`, which does the work on a GPU. Repeatable bit for bit.
    Raises: ValueError for sizes, dtypes or strides that do not fit.
    """
    check_pair(store, store.shape[1], dy, dy.dtype)
    out: torch.Tensor = _op(store, dy, kernel_size, stride, padding, dilation, out_dtype)
    return out
