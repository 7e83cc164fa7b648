"""Weight gradient of the selected input channels of a convolution with groups = 1 and more than one tap.

N images, K selected channels, Kp = K rounded up to 8, O out, H x W input pixels, P x Q output pixels, R x S taps;
store [K, N, H, W] ("planes") or [N, H, W, Kp] ("taps"), dy [N, O, P, Q].

An implicit matrix product [R S Kp, N P Q] x [N P Q, O]: row (r, s, j) of the left operand is channel j shifted to tap
(r, s), read from the pixel-major store in 16-byte pieces. It is loaded as [rows, pixels] so that the dot needs no
transpose: then its load is asynchronous on sm_80 too. What waits for the backward must not pay for channels rounded
up, so a budget counts planes, which are turned here, layer by layer.
"""

from __future__ import annotations

import math
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
from trady_triton.ops.dispatch import INTERPRET, jit, launch, takes_library, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import Arch, Config, Shape, next_power_of_2, rule, select_config, split_count
from trady_triton.ops.splitk_reduce import splitk_reduce_launch
from trady_triton.ops.store import padded, store_channels
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
    store: torch.Tensor, dy: torch.Tensor, geometry: Geometry, out_dtype: torch.dtype = torch.float32,
    k: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `conv_wgrad` computes, by torch's convolution backward on the compact data (cuDNN on a GPU)."""
    x = store.transpose(0, 1) if k is None else store[..., :k].permute(0, 3, 1, 2)
    O, K = dy.shape[1], x.shape[1]
    if K == 0 or dy.numel() == 0:
        return dy.new_zeros(K, O, *geometry.kernel_size, dtype=out_dtype)
    x, padding = fit_padding(upcast(x), dy.shape[2:], geometry)
    if dy.is_contiguous(memory_format=torch.channels_last):  # else torch would turn dy, which is larger
        x = x.contiguous(memory_format=torch.channels_last)
    weight = x.new_empty(()).expand(O, K, *geometry.kernel_size)
    _, dw, _ = torch.ops.aten.convolution_backward(
        upcast(dy), x, weight, None, geometry.stride, padding, geometry.dilation, False, (0, 0), 1, (False, True, False)
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


def _launch(x: torch.Tensor, dy: torch.Tensor, out: torch.Tensor, k: int, config: Config, geometry: Geometry) -> None:
    """Fill out: partials [split, TAPS, K, O] where `config` splits, else the result [K, O, R, S]."""
    (N, H, W, Kp), (O, P, Q) = x.shape, dy.shape[1:]
    BM, BN, BK = (config.meta[name] for name in ("BM", "BN", "BK"))
    image, pixel, channel = image_strides(dy)
    launch(
        _conv_wgrad_kernel, (ceil_div(geometry.taps * Kp, BM), ceil_div(O, BN), config.split),
        x, dy, out, N, O, k, Kp // 8, image, pixel, ceil_div(ceil_div(N * P * Q, BK), config.split),
        config=config, H=H, W=W, PQ=P * Q, Q=Q, TAPS=geometry.taps, **geometry.constants(), CHANNEL=channel,
        PARTIAL=config.split > 1, PREC=dot_precision(x.dtype), UP=INTERPRET,
    )  # fmt: skip


def _by_kernel(
    x: torch.Tensor, dy: torch.Tensor, k: int, config: Config, geometry: Geometry, out_dtype: torch.dtype
) -> torch.Tensor:
    """[K, O, R, S] from x [N, H, W, Kp], in one pass or two."""
    out = torch.empty(k, dy.shape[1], *geometry.kernel_size, dtype=out_dtype, device=dy.device)
    if config.split == 1:
        _launch(x, dy, out, k, config, geometry)
        return out
    partials = workspace(dy.device, config.split * out.numel()).view(config.split, geometry.taps, k, dy.shape[1])
    _launch(x, dy, partials, k, config, geometry)
    return splitk_reduce_launch(out, partials, taps=geometry.taps)


def _impl(
    store: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype, k: int | None,
) -> torch.Tensor:  # fmt: skip
    geometry = Geometry(kernel_size, stride, padding, dilation)
    K = store.shape[0] if k is None else k
    size = store[:1].numel() * padded(K) if k is None else store.numel()
    if K > 0 and use_triton(store) and fits_kernel(size, dy := in_place(dy)):
        O, P, Q = dy.shape[1:]
        shape = {"T": dy.numel() // O, "O": O, "K": K, "TAPS": geometry.taps, "PQ": P * Q}
        config = select_config("conv_wgrad", shape, dy.dtype, Arch.of(dy.device))
        if not takes_library(config):
            if k is None:
                store = store_channels(store.transpose(0, 1), torch.arange(K, device=store.device), "taps")
            return _by_kernel(store, dy, K, config, geometry, out_dtype)
    return conv_wgrad_ref(store, dy, geometry, out_dtype, k)


def _fake(
    store: torch.Tensor, dy: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out_dtype: torch.dtype, k: int | None,
) -> torch.Tensor:  # fmt: skip
    return dy.new_empty(store.shape[0] if k is None else k, dy.shape[1], *kernel_size, dtype=out_dtype)


def conv_wgrad_flops(
    store_shape: torch.Size, dy_shape: torch.Size, kernel_size: Sequence[int], stride: Any, padding: Any,
    dilation: Any, out_dtype: Any, k: int | None = None, **_: Any,
) -> int:  # fmt: skip
    """2 N P Q R S K O."""
    return 2 * dy_shape.numel() * kernel_size[0] * kernel_size[1] * (store_shape[0] if k is None else k)


def conv_wgrad_bytes(
    store_shape: Sequence[int], dy_shape: Sequence[int], taps: int, itemsize: int, out_itemsize: int = 4,
    k: int | None = None,
) -> int:  # fmt: skip
    """Bytes that a perfect kernel moves: the store and dy [N, O, P, Q] read once, the result written."""
    K = store_shape[0] if k is None else k
    return itemsize * (math.prod(store_shape) + math.prod(dy_shape)) + out_itemsize * K * dy_shape[1] * taps


_op = register_op(
    "conv_wgrad(Tensor store, Tensor dy, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "ScalarType out_dtype, SymInt? k) -> Tensor",
    _impl,
    _fake,
    conv_wgrad_flops,
)


def conv_wgrad(
    store: torch.Tensor,
    dy: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.float32,
    *,
    k: int | None = None,
) -> torch.Tensor:
    """Compact weight gradient [K, O, R, S] in `out_dtype` of a convolution, accumulated in fp32.

    store: [K, N, H, W] ("planes" of store_channels) of dy's dtype; with `k`, [N, H, W, Kp] ("taps") of which the first
    k channels count, as the kernel reads it. dy: [N, O, P, Q] in any memory format, read in place. `padding` is top and
    left: pixels outside the image are zeros, and P and Q say how far bottom and right reach. Repeatable bit for bit. A
    quantised store goes through dequantize_channels first: that pass is short against dy, and reading codes here would
    cost the asynchronous 16-byte loads.
    Raises: ValueError for sizes, dtypes or strides that do not fit.
    """
    check_pair(store, 1 if k is None else 0, dy, dy.dtype)
    if k is not None and (store.shape[3] % 8 or not 0 <= k <= store.shape[3]):
        raise ValueError(f"k: got {k} of a store {tuple(store.shape)}, wanted at most its channels, a multiple of 8")
    out: torch.Tensor = _op(store, dy, kernel_size, stride, padding, dilation, out_dtype, k)
    return out
