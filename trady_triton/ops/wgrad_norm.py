"""Squared norm of the weight gradient of every input channel, without holding the weight gradient.

N images, T tokens or pixels, C input channels, O outputs, G groups;   x [..., C] or [N, C, H, W], dy [..., O] or
[N, O, P, Q].   A program owns a tile of (channels, outputs) over all tokens, squares it in registers and writes one
number a channel: exact, and the workspace is C numbers a tile of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.grad import conv2d_weight

from trady_triton.ops.dispatch import INTERPRET, jit, launch, takes_library, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import (
    MAX_WORKSPACE_BYTES,
    Arch,
    Config,
    Shape,
    next_power_of_2,
    rule,
    select_config,
)
from trady_triton.ops.splitk_reduce import splitk_reduce_launch
from trady_triton.ops.tile import dot_precision, load_tokens, tile_dot
from trady_triton.ops.token_layout import TokenLayout, as_batches, in_same_batches, out_of_int32, token_layout
from trady_triton.ops.token_matmul import token_matmul
from trady_triton.ops.workspace import workspace


@jit
def _wgrad_sqnorm_kernel(
    x_ptr, dy_ptr, out_ptr, T, C, O, x_image, x_pixel, dy_image, dy_pixel,
    X_PQ: tl.constexpr, X_CHANNEL: tl.constexpr, PQ: tl.constexpr, CHANNEL: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # out [tiles of O, C]
    tiles_m = tl.cdiv(C, BM)
    tile = tl.program_id(0)
    j = tile % tiles_m * BM + tl.arange(0, BM)
    c = tile // tiles_m * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for t0 in range(0, T, BK):
        t = t0 + tl.arange(0, BK)
        x = load_tokens(x_ptr, t, j, T, C, x_image, x_pixel, X_PQ, X_CHANNEL, WIDE, True)  # [BK, BM]
        dy = load_tokens(dy_ptr, t, c, T, O, dy_image, dy_pixel, PQ, CHANNEL, WIDE, True)  # [BK, BN]
        acc = tile_dot(tl.trans(x), dy, acc, PREC, UP)
    out = out_ptr + (tile // tiles_m).to(tl.int64) * C + j
    tl.store(out, tl.sum(acc * acc, axis=1), mask=j < C)


def wgrad_sqnorm_ref(x: torch.Tensor, dy: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """What `wgrad_sqnorm` computes: the gradient of as many outputs at once as fit in 8 MiB."""
    x, dy = in_same_batches(as_batches(x, channel_dim), as_batches(dy, channel_dim))
    chunk = max(1, MAX_WORKSPACE_BYTES // (4 * max(x.shape[2], 1)))
    parts = [token_matmul(x.transpose(1, 2), part).square().sum(1) for part in dy.split(chunk, dim=2)]
    return torch.stack(parts).sum(0)


@rule("wgrad_sqnorm")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """The largest tile that still fills the device.

    Too few tiles (nothing is split here), or more than the workspace has room for, and fp32 go to cuBLAS.
    """
    BM = min(max(next_power_of_2(shape["C"]), 16), 128)
    BN = min(max(next_power_of_2(shape["O"]), 32), 64 if BM <= 32 else 128)
    tiles = -(-shape["C"] // BM) * -(-shape["O"] // BN)
    if tiles < arch.num_sms:
        BM, BN = min(BM, 64), min(BN, 64)
        tiles = -(-shape["C"] // BM) * -(-shape["O"] // BN)
    too_many = 4 * -(-shape["O"] // BN) * shape["C"] > MAX_WORKSPACE_BYTES
    mm = tiles < arch.num_sms or too_many or dtype == torch.float32
    BK = 32 if dtype == torch.float32 else 64
    stages = 2 if arch.hip else 3
    warps = 8 if BM * BN >= 16384 else 4
    return Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=warps, num_stages=stages, backend="mm" if mm else "triton")


def _launch(x: torch.Tensor, dy: torch.Tensor, a: TokenLayout, b: TokenLayout, config: Config) -> torch.Tensor:
    """`a` and `b` are the layouts of x and dy."""
    tiles_n = -(-b.O // config.meta["BN"])
    partials = workspace(x.device, tiles_n * a.O).view(tiles_n, a.O)
    launch(
        _wgrad_sqnorm_kernel, (-(-a.O // config.meta["BM"]) * tiles_n,),
        x, dy, partials, a.T, a.O, b.O, a.image, a.pixel, b.image, b.pixel,
        config=config, X_PQ=a.PQ, X_CHANNEL=a.channel, PQ=b.PQ, CHANNEL=b.channel, WIDE=out_of_int32(x, dy),
        PREC=dot_precision(x.dtype), UP=INTERPRET,
    )  # fmt: skip
    return splitk_reduce_launch(torch.empty(a.O, dtype=torch.float32, device=x.device), partials)


def _impl(x: torch.Tensor, dy: torch.Tensor, channel_dim: int) -> torch.Tensor:
    if x.numel() == 0 or dy.numel() == 0 or x.dtype == torch.float64 or not use_triton(x):
        return wgrad_sqnorm_ref(x, dy, channel_dim)
    a, b = token_layout(x, channel_dim), token_layout(dy, channel_dim)
    if a is None or b is None:
        return _impl(x.contiguous(), dy.contiguous(), channel_dim)
    config = select_config("wgrad_sqnorm", {"T": a.T, "C": a.O, "O": b.O}, x.dtype, Arch.of(x.device))
    if takes_library(config):
        return wgrad_sqnorm_ref(x, dy, channel_dim)
    return _launch(x, dy, a, b, config)


def _fake(x: torch.Tensor, dy: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return x.new_empty(x.shape[channel_dim], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def wgrad_sqnorm_flops(
    x_shape: torch.Size, dy_shape: torch.Size, channel_dim: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """2 T C O."""
    return 2 * x_shape.numel() * dy_shape[channel_dim]


def wgrad_sqnorm_bytes(T: int, C: int, O: int, itemsize: int) -> int:
    """Bytes that a perfect kernel moves: both operands read once, the norms written."""
    return itemsize * T * (C + O) + 4 * C


_op = register_op("wgrad_sqnorm(Tensor x, Tensor dy, int channel_dim) -> Tensor", _impl, _fake, wgrad_sqnorm_flops)


def wgrad_sqnorm(x: torch.Tensor, dy: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """Squared L2 norm of dW[:, c] of a Linear or 1x1 convolution for every input channel c: [C] in fp32.

    x: [..., C] and dy: [..., O] with `channel_dim` -1, or x [N, C, P, Q] (already strided) and dy [N, O, P, Q] with 1.
    Raises: ValueError when tokens or dtypes differ, or for another channel_dim.
    """
    if channel_dim not in (-1, 1):
        raise ValueError(f"channel_dim: got {channel_dim}, wanted -1 ([..., O]) or 1 ([N, O, P, Q])")
    if x.numel() * dy.shape[channel_dim] != dy.numel() * x.shape[channel_dim] or x.dtype != dy.dtype:
        raise ValueError(
            f"x: got {tuple(x.shape)} {x.dtype}, wanted the tokens and dtype of dy {tuple(dy.shape)} {dy.dtype}"
        )
    out: torch.Tensor = _op(x, dy, channel_dim)
    return out


def conv_wgrad_sqnorm(
    x: torch.Tensor,
    dy: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """Squared L2 norm of dW of any convolution for every input channel: [C] in the dtype of accumulation.

    x: [N, C, H, W], dy: [N, O, P, Q]. The gradient is taken (by cuDNN on a GPU) in chunks of at most 8 MiB.
    """
    if tuple(kernel_size) == (1, 1) and groups == 1 and tuple(padding) == (0, 0):
        return wgrad_sqnorm(x[:, :, :: stride[0], :: stride[1]], dy, 1)
    shape = (x.shape[1] // groups, *kernel_size)
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    if groups == 1:
        parts = dy.split(max(1, MAX_WORKSPACE_BYTES // (4 * math.prod(shape))), dim=1)
        return torch.stack([_conv_sqnorm(x, part, shape, geometry, 1) for part in parts]).sum(0)
    outputs = dy.shape[1] // groups
    size = max(1, MAX_WORKSPACE_BYTES // (4 * outputs * math.prod(shape)))  # groups
    pairs = zip(x.split(size * shape[0], dim=1), dy.split(size * outputs, dim=1), strict=True)
    return torch.cat([_conv_sqnorm(*pair, shape, geometry, pair[0].shape[1] // shape[0]) for pair in pairs])


def _conv_sqnorm(
    x: torch.Tensor, dy: torch.Tensor, shape: tuple[int, ...], geometry: tuple[tuple[int, ...], ...], groups: int
) -> torch.Tensor:
    """Norms of the channels of x; `shape` is (C/G, R, S) and `geometry` (stride, padding, dilation)."""
    stride, padding, dilation = geometry
    gradient = conv2d_weight(x, (dy.shape[1], *shape), dy, stride, padding, dilation, groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms: torch.Tensor = gradient.to(dtype).square().unflatten(0, (groups, -1)).sum((1, 3, 4)).flatten()
    return norms
