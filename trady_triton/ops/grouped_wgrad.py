"""Weight gradient of the selected input channels of a grouped or depthwise convolution.

N images, C in, O out, G groups, M = O / G, K selected channels, H x W input pixels, P x Q output pixels, R x S taps;
store [K, N, H, W] (layout CN, plain or 8-bit codes), dy [N, O, P, Q].

Every selected channel meets only the M planes of dy of its own group. With few of them (depthwise: one) the kernel of
depthwise_wgrad.py computes; with more this one: a matrix product [R S, N P Q] x [N P Q, M] for each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trady_triton.ops.conv_geometry import (
    Geometry,
    ceil_div,
    check_pair,
    fit_padding,
    fits_kernel,
    image_strides,
    in_place,
    upcast,
)
from trady_triton.ops.depthwise_wgrad import depthwise_shape, depthwise_wgrad_launch, dequantize_tile
from trady_triton.ops.dispatch import INTERPRET, jit, launch, takes_library, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.quantize import dequantize_channels_ref, quantized_bytes
from trady_triton.ops.select_config import Arch, Config, Shape, next_power_of_2, rule, select_config, split_count
from trady_triton.ops.splitk_reduce import splitk_reduce_launch
from trady_triton.ops.tile import dot_precision, tile_dot
from trady_triton.ops.workspace import workspace

MAX_DIAGONAL_OUTPUTS = 8


@jit(do_not_specialize=["N", "K", "steps"])
def _grouped_wgrad_kernel(
    x_ptr, scale_ptr, zero_ptr, channels_ptr, dy_ptr, out_ptr, N, K, C_GROUP, M, image, pixel, steps,
    H: tl.constexpr, W: tl.constexpr, PQ: tl.constexpr, Q: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # out [splits, K, M, TAPS]
    TAP_TILES: tl.constexpr = (TAPS + BM - 1) // BM
    j = tl.program_id(0).to(tl.int64)
    tap = tl.program_id(1) % TAP_TILES * BM + tl.arange(0, BM)
    o = tl.program_id(1) // TAP_TILES * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    x_ptr += j * N * H * W
    dy_ptr += tl.load(channels_ptr + j).to(tl.int64) // C_GROUP * M * CHANNEL
    h0 = tap // S * DILATION_H - TOP
    w0 = tap % S * DILATION_W - LEFT
    T = N * PQ
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(T, BK))):
        t = step * BK + tl.arange(0, BK)
        n = t // PQ
        h = h0[:, None] + (t % PQ // Q * STRIDE_H)[None, :]
        w = w0[:, None] + (t % PQ % Q * STRIDE_W)[None, :]
        keep = (tap < TAPS)[:, None] & (t < T)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(x_ptr + ((n * H)[None, :] + h) * W + w, mask=keep, other=0)  # [BM, BK]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + j * N + n, mask=t < T, other=0.0)[None, :]
            zero = tl.load(zero_ptr + j * N + n, mask=t < T, other=0.0)[None, :]
            x = dequantize_tile(x, keep, scale, zero).to(dy_ptr.dtype.element_ty)
        keep = (t < T)[:, None] & (o < M)[None, :]
        dy = tl.load(dy_ptr + (n * image + t % PQ * pixel)[:, None] + (o * CHANNEL)[None, :], mask=keep, other=0.0)
        acc = tile_dot(x, dy, acc, PREC, UP)
    offs = ((split.to(tl.int64) * K + j) * M + o)[None, :] * TAPS + tap[:, None]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=(tap < TAPS)[:, None] & (o < M)[None, :])


def grouped_wgrad_ref(
    x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, group: Sequence[int], geometry: Geometry,
    out_dtype: torch.dtype = torch.float32, *, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `grouped_wgrad` computes, by torch's convolution backward with every selected channel as its own group."""
    K, M = x.shape[0], group[1]
    if K == 0 or dy.numel() == 0:
        return dy.new_zeros(K, M, *geometry.kernel_size, dtype=out_dtype)
    if scale is not None and zero is not None:
        x = dequantize_channels_ref(x, scale, zero, "planes", 8, x.shape, dy.dtype)
    planes, padding = fit_padding(upcast(x).transpose(0, 1), dy.shape[2:], geometry)
    picked = dy.unflatten(1, (-1, M)).index_select(1, channels // group[0]).flatten(1, 2)  # [N, K M, P, Q]
    weight = planes.new_empty(()).expand(K * M, 1, *geometry.kernel_size)
    _, dw, _ = torch.ops.aten.convolution_backward(
        upcast(picked), planes, weight, None, geometry.stride, padding, geometry.dilation, False, (0, 0), K,
        (False, True, False),
    )  # fmt: skip
    result: torch.Tensor = dw.view(K, M, *geometry.kernel_size).to(out_dtype)
    return result


@rule("grouped_wgrad")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """All taps in one tile up to 64, all outputs of a group up to 64 (32 where exact fp32 needs the registers)."""
    taps, M, K, T = shape["TAPS"], shape["M"], shape["K"], shape["T"]
    BM = min(max(next_power_of_2(taps), 16), 64)
    BN = min(max(next_power_of_2(M), 16), 32 if dtype == torch.float32 and BM == 64 else 64)
    BK = 32 if dtype == torch.float32 or BM == 64 else 64
    programs = K * ceil_div(taps, BM) * ceil_div(M, BN)
    step_bytes = dtype.itemsize * BK * (BM + BN)
    split = split_count(programs, ceil_div(T, BK), step_bytes, 4 * K * M * taps, 4 * arch.num_sms)
    stages = 2 if arch.hip else 3
    return Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=4, num_stages=stages, split=split)


def _launch(
    x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    out: torch.Tensor, config: Config, group: Sequence[int], geometry: Geometry,
) -> None:  # fmt: skip
    """Fill out [splits, K, M, R, S]."""
    (K, N, H, W), (P, Q) = x.shape, dy.shape[2:]
    image, pixel, channel = image_strides(dy)
    tiles = ceil_div(geometry.taps, config.meta["BM"]) * ceil_div(group[1], config.meta["BN"])
    steps = ceil_div(ceil_div(N * P * Q, config.meta["BK"]), config.split)
    launch(
        _grouped_wgrad_kernel, (K, tiles, config.split),
        x, scale, zero, channels, dy, out, N, K, *group, image, pixel, steps,
        config=config, H=H, W=W, PQ=P * Q, Q=Q, TAPS=geometry.taps, **geometry.constants(), CHANNEL=channel,
        PREC=dot_precision(dy.dtype), UP=INTERPRET,
    )  # fmt: skip


def _choose(x: torch.Tensor, dy: torch.Tensor, M: int, geometry: Geometry) -> tuple[Any, Config]:
    """The launch function and the config of the kernel that suits these sizes."""
    arch = Arch.of(x.device)
    if M <= MAX_DIAGONAL_OUTPUTS:
        config = select_config("depthwise_wgrad", depthwise_shape(x, dy, M, geometry), dy.dtype, arch)
        if config.backend != "taps":
            return depthwise_wgrad_launch, config
    shape = {"K": x.shape[0], "M": M, "TAPS": geometry.taps, "T": dy[:, 0].numel()}
    return _launch, select_config("grouped_wgrad", shape, dy.dtype, arch)


def _impl(
    x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    group: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    geometry = Geometry(kernel_size, stride, padding, dilation)
    if use_triton(x) and fits_kernel(x.numel(), dy := in_place(dy)):
        channels = channels.contiguous()
        if scale is not None and zero is not None:
            scale, zero = scale.contiguous(), zero.contiguous()
        fill, config = _choose(x, dy, group[1], geometry)
        if not takes_library(config):
            out = torch.empty(x.shape[0], group[1], *kernel_size, dtype=out_dtype, device=dy.device)
            if config.split == 1:
                fill(x, dy, channels, scale, zero, out, config, group, geometry)
                return out
            partials = workspace(dy.device, config.split * out.numel()).view(config.split, -1)
            fill(x, dy, channels, scale, zero, partials, config, group, geometry)
            return splitk_reduce_launch(out, partials)
    return grouped_wgrad_ref(x, dy, channels, group, geometry, out_dtype, scale=scale, zero=zero)


def _fake(
    x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    group: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return dy.new_empty(x.shape[0], group[1], *kernel_size, dtype=out_dtype)


def grouped_wgrad_flops(
    x_shape: torch.Size, dy_shape: torch.Size, channels_shape: torch.Size, scale: Any, zero: Any, group: Sequence[int],
    kernel_size: Sequence[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """2 N P Q R S K M."""
    N, _O, P, Q = dy_shape
    return 2 * N * P * Q * kernel_size[0] * kernel_size[1] * x_shape[0] * group[1]


def grouped_wgrad_bytes(
    x_shape: Sequence[int], dy_shape: Sequence[int], M: int, taps: int, itemsize: int,
    bits: int = 0, out_itemsize: int = 4,
) -> int:  # fmt: skip
    """Bytes that a perfect kernel moves when no two channels share a group: store, K M planes of dy, the result."""
    (K, N, H, W), (_, O, P, Q) = x_shape, dy_shape
    store = quantized_bytes("planes", x_shape, bits) if bits else itemsize * K * N * H * W
    return store + itemsize * N * min(K * M, O) * P * Q + out_itemsize * K * M * taps


_op = register_op(
    "grouped_wgrad(Tensor x, Tensor dy, Tensor channels, Tensor? scale, Tensor? zero, int[2] group, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, ScalarType out_dtype) -> Tensor",
    _impl,
    _fake,
    grouped_wgrad_flops,
)


def grouped_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    channels: torch.Tensor,
    group: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.float32,
    *,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compact weight gradient [K, M, R, S] in `out_dtype` of a grouped convolution, accumulated in fp32.

    x: store [K, N, H, W] of dy's dtype, or 8-bit codes of quantize_channels ("planes") with their `scale` and `zero`
    (4-bit codes do not know H and W: dequantize_channels makes a store of them); dy: [N, O, P, Q] in any memory format,
    read in place; channels: [K] ids of the input channels, any integer dtype; group: (C / G, O / G), the channels of a
    group. `padding` is top and left: pixels outside the image are zeros, and P and Q say how far bottom and right
    reach. Repeatable bit for bit.
    Raises: ValueError for sizes, dtypes or strides that do not fit.
    """
    if (scale is None) != (zero is None):
        raise ValueError("scale and zero: got one of them, wanted both or neither")
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != x.shape[:2]:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}, wanted {tuple(x.shape[:2])}")
    check_pair(x, 1, dy, torch.uint8 if scale is not None else dy.dtype)
    if channels.shape != x.shape[:1] or channels.is_floating_point():
        raise ValueError(f"channels: got {channels.dtype} {tuple(channels.shape)}, wanted {x.shape[0]} integers")
    if dy.shape[1] % group[1]:
        raise ValueError(f"group: got {group[1]} outputs a group, wanted a divisor of the {dy.shape[1]} channels of dy")
    out: torch.Tensor = _op(x, dy, channels, scale, zero, group, kernel_size, stride, padding, dilation, out_dtype)
    return out
