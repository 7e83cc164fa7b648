"""What the weight gradients of all convolutions share on the host: geometry, strides of dy, padding of the torch twin.

N images, O out, H x W input pixels, P x Q output pixels, R x S taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trady_triton.ops.token_layout import token_layout

MAX_OFFSET = 2**31 - 2**12  # of an element, in 32 bits: tiles count on past the last one


class Geometry(NamedTuple):
    """(R, S) and, for both axes, what a convolution does; `padding` is top and left."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def taps(self) -> int:
        """R S."""
        return self.kernel_size[0] * self.kernel_size[1]

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        (_, S), (stride_h, stride_w), (top, left), (dilation_h, dilation_w) = self
        return {
            "S": S, "STRIDE_H": stride_h, "STRIDE_W": stride_w, "TOP": top, "LEFT": left,
            "DILATION_H": dilation_h, "DILATION_W": dilation_w,
        }  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def in_place(dy: torch.Tensor) -> torch.Tensor:
    """dy itself where its pixels lie at one stride (contiguous, channels_last, expanded), else a contiguous copy."""
    return dy if token_layout(dy, 1) else dy.contiguous()


def image_strides(dy: torch.Tensor) -> tuple[int, int, int]:
    """(image, pixel, channel) strides of what `in_place` returned; the pixels of an image are numbered p Q + q."""
    layout = token_layout(dy, 1)
    assert layout is not None
    if layout.PQ > 1:
        return layout.image, layout.pixel, layout.channel
    return dy.shape[2] * dy.shape[3] * layout.image, layout.image, layout.channel


def fits_kernel(store_size: int, dy: torch.Tensor) -> bool:
    """Whether the kernels can compute on a store of so many elements: not empty, no float64, offsets of 32 bits."""
    span = sum((size - 1) * stride for size, stride in zip(dy.shape, dy.stride(), strict=True))
    most = max(store_size, span, dy[:, :1].numel())
    return store_size > 0 and dy.numel() > 0 and dy.dtype != torch.float64 and most <= MAX_OFFSET


def check_pair(store: torch.Tensor, image_dim: int, dy: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where the store is not of `dtype` or has not the images of dy [N, O, P, Q]."""
    if store.dim() != 4 or dy.dim() != 4 or store.shape[image_dim] != dy.shape[0]:
        raise ValueError(f"store: got {tuple(store.shape)}, wanted 4 axes with the images of dy {tuple(dy.shape)}")
    if store.dtype != dtype or not store.is_contiguous():
        raise ValueError(f"store: got {store.dtype} with strides {store.stride()}, wanted contiguous {dtype}")


def fit_padding(x: torch.Tensor, out_size: Sequence[int], geometry: Geometry) -> tuple[torch.Tensor, Sequence[int]]:
    """x [N, C, H, W] and a symmetric padding for torch that give out_size; pads x itself where none does.

    What bottom and right need follows from out_size (timm's Conv2dSame pads them more than top and left).
    """
    kernel_size, stride, padding, dilation = geometry
    reach = [(o - 1) * s + (r - 1) * d + 1 for o, s, r, d in zip(out_size, stride, kernel_size, dilation, strict=True)]
    slack = [size + 2 * p - need for size, p, need in zip(x.shape[2:], padding, reach, strict=True)]
    if all(0 <= left < s for left, s in zip(slack, stride, strict=True)):
        return x, padding
    bottom, right = (need - p - size for need, p, size in zip(reach, padding, x.shape[2:], strict=True))
    return torch.nn.functional.pad(x, (padding[1], right, padding[0], bottom)), (0, 0)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 where torch would accumulate in less: half precision on the CPU."""
    return x.float() if x.dtype.itemsize < 4 and not x.is_cuda else x
