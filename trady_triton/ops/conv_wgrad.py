"""Weight gradient of the selected input channels of a convolution with groups = 1 and more than one tap.

N images, K selected channels, Kp = K rounded up to 8, O out, H x W input pixels, P x Q output pixels, R x S taps,
store [N, H, W, Kp] (layout PM), dy [N, O, P, Q].

An implicit matrix product [R S Kp, N P Q] x [N P Q, O]: row (r, s, j) of the left operand is channel j shifted to tap
(r, s), read from the pixel-major store in 16-byte pieces. It is loaded as [rows, pixels] so that the dot needs no
transpose: then its load is asynchronous on sm_80 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trady_triton.ops.conv_geometry import (
    ceil_div,
    check_pair,
    fit_padding,
    fits_kernel,
    image_strides,
    in_place,
    upcast,
)
from trady_triton.ops.dispatch import INTERPRET, jit, launch, takes_library, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import Arch, Config, Shape, next_power_of_2, rule, select_config, split_count
from trady_triton.ops.splitk_reduce import splitk_reduce_launch
from trady_triton.ops.store import padded
from trady_triton.ops.tile import dot_precision, tile_dot
from trady_triton.ops.workspace import workspace


@jit(do_not_specialize=["N", "K", "UNITS", "steps"])
def _conv_wgrad_kernel(
    x_ptr, dy_ptr, out_ptr, N, O, K, UNITS, image, pixel, steps,
    H: tl.constexpr, W: tl.constexpr, PQ: tl.constexpr, Q: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNEL: tl.constexpr, PARTIAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # out [splits, TAPS, K, O] with PARTIAL, else [K, O, TAPS]
    Kp = UNITS * 8  # so that the compiler knows that 8 rows are contiguous though K is not specialised
    T = N * PQ  # computed here, so that its alignment is known and masked loads of dy stay vectorised
    split = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    tap = m // Kp
    j = m % Kp
    h0 = tap // S * DILATION_H - TOP
    w0 = tap % S * DILATION_W - LEFT
    row = (h0 * W + w0) * Kp + j
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(T, BK))):
        t = step * BK + tl.arange(0, BK)
        n = t // PQ
        h = h0[:, None] + (t % PQ // Q * STRIDE_H)[None, :]
        w = w0[:, None] + (t % PQ % Q * STRIDE_W)[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        column = ((n * H + t % PQ // Q * STRIDE_H) * W + t % PQ % Q * STRIDE_W) * Kp
        keep = (m < TAPS * Kp)[:, None] & (t < T)[None, :] & inside
        x = tl.load(x_ptr + row[:, None] + column[None, :], mask=keep, other=0.0)  # [BM, BK]
        keep = (t < T)[:, None] & (o < O)[None, :]
        dy = tl.load(dy_ptr + (n * image + t % PQ * pixel)[:, None] + (o * CHANNEL)[None, :], mask=keep, other=0.0)
        acc = tile_dot(x, dy, acc, PREC, UP)
    if PARTIAL:
        offs = ((split * TAPS + tap) * K + j).to(tl.int64)[:, None] * O + o[None, :]
    else:
        offs = (j * (O * TAPS) + tap)[:, None] + (o * TAPS)[None, :]
    keep = ((m < TAPS * Kp) & (j < K))[:, None] & (o < O)[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=keep)


def conv_wgrad_ref(
    x: torch.Tensor,
    dy: torch.Tensor,
    k: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What `conv_wgrad` computes, by torch's convolution backward on the compact data (cuDNN on a GPU)."""
    return dense_wgrad(x[..., :k].permute(0, 3, 1, 2), dy, kernel_size, stride, padding, dilation, out_dtype)


def dense_wgrad(
    x: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """dW [K, O, R, S] of x [N, K, H, W], by torch."""
    if x.shape[1] == 0 or dy.numel() == 0:
        return dy.new_zeros(x.shape[1], dy.shape[1], *kernel_size, dtype=out_dtype)
    x, padding = fit_padding(upcast(x), dy.shape[2:], kernel_size, stride, padding, dilation)
    if dy.is_contiguous(memory_format=torch.channels_last):  # else torch would turn dy, which is larger
        x = x.contiguous(memory_format=torch.channels_last)
    weight = x.new_empty(()).expand(dy.shape[1], x.shape[1], *kernel_size)
    _, dw, _ = torch.ops.aten.convolution_backward(
        upcast(dy), x, weight, None, stride, padding, dilation, False, (0, 0), 1, (False, True, False)
    )
    result: torch.Tensor = dw.transpose(0, 1).to(out_dtype).contiguous()
    return result


@rule("conv_wgrad")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """Up to 256 rows (tap, channel) for each pass over dy; as many splits of the pixels as fill the device.

    Where dy is read in 2-byte pieces (7 x 7 pixels, NCHW) half a tile of outputs keeps them all in registers.
    Above 256 channels arithmetic bounds the layer, and exact fp32 has no matrix units: there cuDNN on the compact data.
    """
    rows, T, O, taps = shape["TAPS"] * padded(shape["K"]), shape["T"], shape["O"], shape["TAPS"]
    BM = min(max(next_power_of_2(rows), 32), 256 if dtype != torch.float32 else 64)
    BN = min(max(next_power_of_2(O), 16), 32 if shape["PQ"] % 4 else 64)
    BK = 32 if dtype == torch.float32 else 64
    programs = ceil_div(rows, BM) * ceil_div(O, BN)
    slots = (1 if BM == 256 else 2) * arch.num_sms
    step_bytes = dtype.itemsize * BK * (BM + BN)
    split = split_count(programs, ceil_div(T, BK), step_bytes, 4 * taps * shape["K"] * O, slots)
    return Config(
        {"BM": BM, "BN": BN, "BK": BK},
        num_warps=8 if BM >= 128 else 4,
        num_stages=2 if arch.hip else 3,
        split=split,
        backend="mm" if shape["K"] > 256 or dtype == torch.float32 else "triton",
    )


def _launch(
    x: torch.Tensor, dy: torch.Tensor, out: torch.Tensor, k: int, config: Config, kernel_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> None:  # fmt: skip
    """Fill out: partials [split, TAPS, K, O] where `config` splits, else the result [K, O, R, S]."""
    (N, H, W, Kp), (O, P, Q) = x.shape, dy.shape[1:]
    BM, BN, BK = (config.meta[name] for name in ("BM", "BN", "BK"))
    taps = kernel_size[0] * kernel_size[1]
    image, pixel, channel = image_strides(dy)
    launch(
        _conv_wgrad_kernel, (ceil_div(taps * Kp, BM), ceil_div(O, BN), config.split),
        x, dy, out, N, O, k, Kp // 8, image, pixel, ceil_div(ceil_div(N * P * Q, BK), config.split),
        config=config, H=H, W=W, PQ=P * Q, Q=Q, TAPS=taps, S=kernel_size[1],
        STRIDE_H=stride[0], STRIDE_W=stride[1], TOP=padding[0], LEFT=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], CHANNEL=channel, PARTIAL=config.split > 1,
        PREC=dot_precision(x.dtype), UP=INTERPRET,
    )  # fmt: skip


def conv_config(dy: torch.Tensor, k: int, kernel_size: Sequence[int]) -> Config:
    """What runs for k channels and dy [N, O, P, Q]."""
    O, taps = dy.shape[1], kernel_size[0] * kernel_size[1]
    shape = {"T": dy.numel() // O, "O": O, "K": k, "TAPS": taps, "PQ": dy.shape[2] * dy.shape[3]}
    return select_config("conv_wgrad", shape, dy.dtype, Arch.of(dy.device))


def conv_wgrad_impl(
    x: torch.Tensor, dy: torch.Tensor, k: int, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The op: x [N, H, W, Kp], dy [N, O, P, Q] -> [K, O, R, S]."""
    geometry = (kernel_size, stride, padding, dilation)
    dy = in_place(dy)
    if k == 0 or not use_triton(x) or not fits_kernel(x, dy):
        return conv_wgrad_ref(x, dy, k, *geometry, out_dtype)
    config = conv_config(dy, k, kernel_size)
    if takes_library(config):
        return conv_wgrad_ref(x, dy, k, *geometry, out_dtype)
    O, taps = dy.shape[1], kernel_size[0] * kernel_size[1]
    out = torch.empty(k, O, *kernel_size, dtype=out_dtype, device=dy.device)
    if config.split == 1:
        _launch(x, dy, out, k, config, *geometry)
        return out
    partials = workspace(dy.device, config.split * out.numel()).view(config.split, taps, k, O)
    _launch(x, dy, partials, k, config, *geometry)
    return splitk_reduce_launch(out, partials, taps=taps)


def _fake(
    x: torch.Tensor, dy: torch.Tensor, k: int, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return dy.new_empty(k, dy.shape[1], *kernel_size, dtype=out_dtype)


def conv_wgrad_flops(
    x_shape: torch.Size, dy_shape: torch.Size, k: int, kernel_size: Sequence[int], *_: Any, **__: Any
) -> int:
    """2 N P Q R S K O."""
    N, O, P, Q = dy_shape
    return 2 * N * P * Q * kernel_size[0] * kernel_size[1] * k * O


def conv_wgrad_bytes(
    x_shape: Sequence[int], dy_shape: Sequence[int], k: int, taps: int, itemsize: int, out_itemsize: int = 4
) -> int:
    """Bytes that a perfect kernel moves: the store [N, H, W, Kp] and dy [N, O, P, Q] read once, the result written."""
    (N, H, W, Kp), (_, O, P, Q) = x_shape, dy_shape
    return itemsize * N * (H * W * Kp + P * Q * O) + out_itemsize * k * O * taps


_op = register_op(
    "conv_wgrad(Tensor x, Tensor dy, SymInt k, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "ScalarType out_dtype) -> Tensor",
    conv_wgrad_impl,
    _fake,
    conv_wgrad_flops,
)


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    k: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Compact weight gradient [K, O, R, S] in `out_dtype` of a convolution, accumulated in fp32.

    x: store [N, H, W, Kp] of which the first k channels count; dy: [N, O, P, Q] of x's dtype in any memory format, read
    in place. `padding` is top and left: pixels outside the image are zeros, and P and Q say how far bottom and right
    reach. Repeatable bit for bit. A quantised store goes through dequantize_channels first: that pass is short against
    dy, and reading codes here would cost the asynchronous 16-byte loads.
    Raises: ValueError for sizes, dtypes or strides that do not fit.
    """
    check_pair(x, x.shape[0], dy, dy.dtype)
    if not 0 <= k <= x.shape[3]:
        raise ValueError(f"k: got {k}, wanted at most the {x.shape[3]} channels of the store")
    out: torch.Tensor = _op(x, dy, k, kernel_size, stride, padding, dilation, out_dtype)
    return out
