"""Compact activation store: copy the selected input channels into the layout that the weight-gradient kernels read.

N images, C channels, K selected channels, H x W pixels (P x Q kept by the stride), T tokens or kept pixels,
Kp = K rounded up to 8.

| layout   | input x      | store                                                | read by                          |
|----------|--------------|------------------------------------------------------|----------------------------------|
| "tokens" | [..., C]     | CM [K, T], T = product of the leading sizes          | token_wgrad (Linear)             |
| "pixels" | [N, C, H, W] | CM [K, T], T = N P Q in (n, p, q) order              | token_wgrad (1x1 conv)           |
| "taps"   | [N, C, H, W] | PM [N, H, W, Kp], channels K..Kp-1 are zero          | conv_wgrad (R S > 1, groups = 1) |
| "planes" | [N, C, H, W] | CN [K, N, H, W]                                      | grouped and depthwise wgrad      |

A store keeps no more than what was asked for, so that a budget counts it exactly; only "taps", which is made for the
time of one kernel, is padded. Rows of a CM store are aligned where T is a multiple of 8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config

LAYOUTS = ("tokens", "pixels", "taps", "planes")


@jit
def token_offset(t, sn, sp, sq, PQ: tl.constexpr, Q: tl.constexpr):
    """Where token t lies in x; the strides are those of `source_strides`."""
    if PQ == 1:
        return t * sn
    elif Q == PQ:
        return t // PQ * sn + t % PQ * sq
    else:
        pixel = t % PQ
        return t // PQ * sn + pixel // Q * sp + pixel % Q * sq


@jit(do_not_specialize=["K", "so"])
def _store_kernel(
    x_ptr, channels_ptr, out_ptr, T, K, so, sn, sp, sq, sc,
    PQ: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, PIXEL_MAJOR: tl.constexpr,
    BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # out has a row stride of so * UNIT: with UNIT = 8 the compiler knows that rows are aligned though so may change.
    # T is specialised: without T % 16 == 0 the mask breaks every access into single elements
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    j = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    channel = tl.load(channels_ptr + j, mask=j < K, other=0).to(tl.int64)
    token = token_offset(t, sn, sp, sq, PQ, Q)
    keep = (j < K)[:, None] & (t < T)[None, :]
    x = tl.load(x_ptr + channel[:, None] * sc + token[None, :], mask=keep, other=0.0)  # [BJ, BT]
    if PIXEL_MAJOR:  # channels K and up get the zeros that the masked load returns
        inside = (j < so * UNIT)[:, None] & (t < T)[None, :]
        tl.store(out_ptr + t[None, :] * (so * UNIT) + j[:, None], x, mask=inside)
    else:
        tl.store(out_ptr + j[:, None] * (so * UNIT) + t[None, :], x, mask=keep)


def padded(size: int, multiple: int = 8) -> int:
    """`size` rounded up to a multiple."""
    return (size + multiple - 1) // multiple * multiple


def kept_pixels(x: torch.Tensor, stride: Sequence[int]) -> tuple[int, int]:
    """(P, Q): how many rows and columns of x [N, C, H, W] a strided 1x1 convolution reads."""
    return (x.shape[2] + stride[0] - 1) // stride[0], (x.shape[3] + stride[1] - 1) // stride[1]


def store_size(x: torch.Tensor, K: int, layout: str, stride: Sequence[int]) -> tuple[int, ...]:
    """The shape of the store for K channels of x."""
    if layout == "tokens":
        return K, math.prod(x.shape[:-1])
    if layout == "pixels":
        return K, x.shape[0] * math.prod(kept_pixels(x, stride))
    if layout == "taps":
        return x.shape[0], x.shape[2], x.shape[3], padded(K)
    return K, x.shape[0], x.shape[2], x.shape[3]


def empty_store(like: torch.Tensor, size: Sequence[int], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """An unwritten store on the device of `like`."""
    return like.new_empty(size, dtype=dtype)


def store_channels_ref(
    x: torch.Tensor, channels: torch.Tensor, layout: str, stride: Sequence[int] = (1, 1)
) -> torch.Tensor:
    """What `store_channels` computes, in torch."""
    K = channels.numel()
    store = empty_store(x, store_size(x, K, layout, stride), layout, x.dtype)
    if layout == "tokens":
        return store.copy_(_pick(x, -1, channels).reshape(store.shape[1], K).t())
    picked = _pick(x[:, :, :: stride[0], :: stride[1]], 1, channels)  # [N, K, P, Q]
    if layout == "taps":
        store[..., K:].zero_()
        store[..., :K].copy_(picked.permute(0, 2, 3, 1))
    elif layout == "pixels":
        store.unflatten(1, (picked.shape[0], *picked.shape[2:])).copy_(picked.transpose(0, 1))
    else:
        store.copy_(picked.transpose(0, 1))
    return store


def _pick(x: torch.Tensor, dim: int, channels: torch.Tensor) -> torch.Tensor:
    """The selected channels; x itself where they are all."""
    return x if are_all(channels, x.shape[dim]) else x.index_select(dim, channels)


def are_all(channels: torch.Tensor, count: int) -> bool:
    """Whether the ids are 0, 1, ... count - 1 in this order, so that nothing need be gathered."""
    return channels.numel() == count and bool((channels == torch.arange(count, device=channels.device)).all())


def source_strides(x: torch.Tensor, layout: str, stride: Sequence[int]) -> tuple[int, int, int, int, int, int]:
    """(PQ, Q, sn, sp, sq, sc): token t of channel c lies at t // PQ * sn + t % PQ // Q * sp + t % PQ % Q * sq + c * sc.

    Sizes that lie behind one another in memory are merged, so that the kernel divides as little as it can.
    """
    if layout == "tokens":
        flat = x.view(-1, x.shape[-1])
        return 1, 1, flat.stride(0), 0, 0, flat.stride(1)
    (P, Q), (sn, sc, sp, sq) = kept_pixels(x, stride), x.stride()
    sp, sq = sp * stride[0], sq * stride[1]
    if P == 1 or sp == Q * sq:
        P, Q = 1, P * Q
        if sn == Q * sq:
            return 1, 1, sq, 0, 0, sc
    return P * Q, Q, sn, sp, sq, sc


def viewable(x: torch.Tensor, layout: str) -> bool:
    """Whether tokens lie at one stride (an exotic view of a Linear input does not: the twin copes)."""
    if layout != "tokens":
        return True
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    rows = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(rows))


@rule("store")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """A tile of 16 channels (8 for few) by 128 tokens moves 16 elements a thread with 4 warps."""
    return Config({"BJ": 8 if shape["K"] <= 8 else 16, "BT": 128}, num_warps=4, num_stages=1)


def _store(x: torch.Tensor, channels: torch.Tensor, layout: str, stride: Sequence[int]) -> torch.Tensor:
    K = channels.numel()
    if not use_triton(x) or not viewable(x, layout):
        return store_channels_ref(x, channels, layout, stride)
    out = empty_store(x, store_size(x, K, layout, stride), layout, x.dtype)
    rows = out.shape[-1] if layout == "taps" else K
    tokens = out.numel() // max(rows, 1)
    if out.numel() == 0:
        return out
    PQ, Q, sn, sp, sq, sc = source_strides(x, layout, stride)
    row = rows if layout == "taps" else tokens
    unit = 8 if row % 8 == 0 else 1
    config = select_config("store", {"T": tokens, "K": K}, x.dtype, Arch.of(x.device))
    grid = (-(-tokens // config.meta["BT"]), -(-rows // config.meta["BJ"]))
    launch(_store_kernel, grid, x, channels.contiguous(), out, tokens, K, row // unit, sn, sp, sq, sc,
           config=config, PQ=PQ, Q=Q, UNIT=unit, PIXEL_MAJOR=layout == "taps")  # fmt: skip
    return out


def _fake(x: torch.Tensor, channels: torch.Tensor, layout: str, stride: Sequence[int]) -> torch.Tensor:
    return empty_store(x, store_size(x, channels.numel(), layout, stride), layout, x.dtype)


_op = register_op("store_channels(Tensor x, Tensor channels, str layout, SymInt[] stride) -> Tensor", _store, _fake)


def store_channels(
    x: torch.Tensor, channels: torch.Tensor, layout: str, stride: Sequence[int] = (1, 1)
) -> torch.Tensor:
    """Copy the selected channels of x into the store of `layout` (see the table above); dtype as x, bit for bit.

    channels: [K] int32 or int64, unique; `stride` is that of the 1x1 convolution and only "pixels" may have one.
    Raises: ValueError for an unknown layout, a wrong number of dimensions or a stride where there is none.
    """
    check_store_arguments(x, layout, stride)
    out: torch.Tensor = _op(x, channels, layout, stride)
    return out


def check_store_arguments(x: torch.Tensor, layout: str, stride: Sequence[int]) -> None:
    """Raises: ValueError as `store_channels` promises."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, wanted one of {', '.join(LAYOUTS)}")
    if layout != "tokens" and x.dim() != 4:
        raise ValueError(f"x for layout {layout!r}: got {x.dim()} dimensions, wanted [N, C, H, W]")
    if layout != "pixels" and tuple(stride) != (1, 1):
        raise ValueError(
            f"stride for layout {layout!r}: got {tuple(stride)}, wanted (1, 1); only 'pixels' has a stride"
        )


def store_bytes(layout: str, num_channels: int, num_tokens: int, itemsize: int) -> int:
    """Bytes that a store keeps."""
    return num_tokens * (padded(num_channels) if layout == "taps" else num_channels) * itemsize


def traffic_bytes(layout: str, num_channels: int, num_tokens: int, itemsize: int) -> int:
    """Bytes that a perfect copy moves: the selected elements and ids read, the store written.

    A token-major x is read in 32-byte sectors, so random channels cost up to 16 times that in 16-bit types.
    """
    return num_channels * (num_tokens * itemsize + 4) + store_bytes(layout, num_channels, num_tokens, itemsize)
