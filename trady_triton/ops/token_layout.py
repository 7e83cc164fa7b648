"""How a gradient in any of the usual layouts is walked token by token, without copying it.

N images, O out, T tokens or kept pixels, PQ pixels of an image.   Token t of channel c lies at
t // PQ * image + t % PQ * pixel + c * channel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class TokenLayout(NamedTuple):
    """Sizes and strides (in elements) of tokens; PQ is 1 where all of them lie at one stride, `image`."""

    T: int
    O: int
    PQ: int
    image: int
    pixel: int
    channel: int


def _single_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride of these axes merged into one, or None where they cannot be."""
    axes = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(axes)):
        return None
    return axes[-1][1] if axes else 1


def token_layout(x: torch.Tensor, channel_dim: int) -> TokenLayout | None:
    """The layout of x [..., O] (channel_dim -1) or [N, O, ...] (channel_dim 1); None where tokens lie irregularly."""
    if channel_dim == -1 or x.dim() == 2:
        if x.is_contiguous():
            O = x.shape[-1]
            return TokenLayout(x.numel() // max(O, 1), O, 1, O, 0, 1)
        stride = _single_stride(x.shape[:-1], x.stride()[:-1])
        T = x.numel() // max(x.shape[-1], 1)
        return None if stride is None else TokenLayout(T, x.shape[-1], 1, stride, 0, x.stride(-1))
    N, O = x.shape[:2]
    PQ = x.shape[2:].numel()
    pixel = _single_stride(x.shape[2:], x.stride()[2:])
    if pixel is None:
        return None
    image = x.stride(0)
    if N == 1 or PQ == 1 or image == PQ * pixel:
        return TokenLayout(N * PQ, O, 1, image if PQ == 1 else pixel, 0, x.stride(1))
    return TokenLayout(N * PQ, O, PQ, image, pixel, x.stride(1))


def as_batches(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """A view (or, where tokens lie irregularly, a copy) of x as [batches, tokens, O], in token order."""
    if channel_dim == -1 or x.dim() == 2:
        return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    if token_layout(x, channel_dim) is None:
        x = x.contiguous()
    pixels = x.flatten(2).transpose(1, 2)
    N, P, O = pixels.shape
    return pixels.reshape(1, N * P, O) if pixels.stride(0) == P * pixels.stride(1) else pixels


def in_same_batches(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [b, t, C] and dy [B, P, O] of the same tokens, the one with a single batch cut like the other."""
    if x.shape[0] < dy.shape[0]:
        return x.reshape(*dy.shape[:2], x.shape[2]), dy
    return x, dy.reshape(*x.shape[:2], dy.shape[2])


def out_of_int32(*tensors: torch.Tensor) -> bool:
    """Whether an offset (in elements) into the memory of one of the tensors needs 64 bits."""
    return any(x.untyped_storage().nbytes() >= x.itemsize << 31 for x in tensors)
