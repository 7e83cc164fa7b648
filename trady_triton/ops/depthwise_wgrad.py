"""The kernel of `grouped_wgrad` for few outputs a group (depthwise: one), as a matrix product summed along diagonals.

N images, K selected channels, M outputs of a group, H x W input pixels, P x Q output pixels, R x S taps; store
[K, N, H, W] (layout CN, plain or 8-bit codes), dy [N, O, P, Q].

For one filter row r, G[q, w] = sum over (n, p) of dy[n, p, q] x[n, p STRIDE_H + r DILATION_H - TOP, w] is a product on
the matrix units, and dW[r, s] is the sum of G along the diagonal w = q STRIDE_W + s DILATION_W - LEFT. Where a plain
reduction reads x once for each tap, from shifted and so unaligned addresses, this reads it once for each filter row and
only in aligned pieces. Several rows r lie side by side in the columns of one two-dimensional dot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trady_triton.ops.conv_geometry import Geometry, ceil_div, image_strides
from trady_triton.ops.dispatch import INTERPRET, jit, launch, tl
from trady_triton.ops.select_config import Arch, Config, Shape, next_power_of_2, rule, split_count
from trady_triton.ops.tile import dot_precision, tile_dot

MAX_COLUMNS = 256


@jit
def dequantize_tile(codes, keep, scale, zero):
    """code * scale + zero in fp32, and zero outside the image: the zero point is not 0."""
    return tl.where(keep, codes.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32), 0.0)


@jit(do_not_specialize=["N", "ROWS", "steps"])
def _depthwise_wgrad_kernel(
    x_ptr, scale_ptr, zero_ptr, channels_ptr, dy_ptr, out_ptr, N, ROWS, C_GROUP, M, image, pixel, steps,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNEL: tl.constexpr,
    RB: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr, BACK: tl.constexpr, BK: tl.constexpr,
    PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # out [splits, ROWS, R, S], ROWS = K * M; BQ columns of dy meet the BW columns of x from q STRIDE_W - BACK on
    Q_TILES: tl.constexpr = (Q + BQ - 1) // BQ
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    j = row // M
    plane = tl.load(channels_ptr + j).to(tl.int64) // C_GROUP * M + row % M
    x_ptr += j * N * H * W
    dy_ptr += plane * CHANNEL
    T = N * P * Q_TILES
    q0 = tl.arange(0, BQ)
    column = tl.arange(0, RB * BW)
    r = tl.program_id(1) * RB + column // BW
    w0 = column % BW
    acc = tl.zeros([BQ, RB * BW], tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(T, BK))):
        t = step * BK + tl.arange(0, BK)
        n = t // (P * Q_TILES)
        p = t // Q_TILES % P
        q = q0[:, None] + (t % Q_TILES * BQ)[None, :]
        keep = (t < T)[None, :] & (q < Q)
        dy = tl.load(dy_ptr + (n * image)[None, :] + ((p * Q)[None, :] + q) * pixel, mask=keep, other=0.0)  # [BQ, BK]
        h = (p * STRIDE_H - TOP)[:, None] + (r * DILATION_H)[None, :]
        w = (t % Q_TILES * (BQ * STRIDE_W) - BACK)[:, None] + w0[None, :]
        keep = (t < T)[:, None] & (r < R)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(x_ptr + ((n * H)[:, None] + h) * W + w, mask=keep, other=0)  # [BK, RB * BW]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + j * N + n, mask=t < T, other=0.0)[:, None]
            zero = tl.load(zero_ptr + j * N + n, mask=t < T, other=0.0)[:, None]
            x = dequantize_tile(x, keep, scale, zero).to(dy.dtype)
        acc = tile_dot(dy, x, acc, PREC, UP)
    r = tl.program_id(1) * RB + tl.arange(0, RB)
    out_ptr += (split.to(tl.int64) * ROWS + row) * (R * S)
    for s in tl.static_range(S):
        on_diagonal = w0[None, :] == (q0 * STRIDE_W + (s * DILATION_W - LEFT + BACK))[:, None]
        columns = tl.sum(tl.where(on_diagonal, acc, 0.0), axis=0)
        total = tl.sum(tl.reshape(columns, [RB, BW]), axis=1)
        tl.store(out_ptr + r * S + s, total.to(out_ptr.dtype.element_ty), mask=r < R)


def _columns(shape: Shape, BQ: int) -> tuple[int, int]:
    """(BW, BACK): how many columns of x a tile of BQ columns of dy needs, and how far left of it they start.

    BACK is a multiple of 8, so that a tile starts where 16-byte loads are aligned.
    """
    reach = (min(BQ, shape["Q"]) - 1) * shape["STRIDE_W"] + (shape["S"] - 1) * shape["DILATION_W"] + 1
    if shape["Q"] <= BQ:
        return max(16, next_power_of_2(max(1, min(shape["W"], reach - shape["LEFT"])))), 0
    back = ceil_div(shape["LEFT"], 8) * 8
    return max(16, next_power_of_2(reach + back - shape["LEFT"])), back


@rule("depthwise_wgrad")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """As many filter rows a program as 256 columns hold (32 in fp32): each reads dy once. "taps" if one is too wide."""
    BQ = 16 if shape["Q"] <= 16 else 32
    BW, back = _columns(shape, BQ)
    BK = 16 if dtype == torch.float32 and BW > 64 else 32  # what is left of the registers
    if BW > MAX_COLUMNS:
        return Config(backend="taps")
    RB = max(1, min(next_power_of_2(shape["R"]), (32 if dtype == torch.float32 else MAX_COLUMNS) // BW))
    programs = shape["ROWS"] * ceil_div(shape["R"], RB)
    steps = ceil_div(shape["N"] * shape["P"] * ceil_div(shape["Q"], BQ), BK)
    step_bytes = dtype.itemsize * BK * (BQ + RB * BW)
    split = split_count(programs, steps, step_bytes, 4 * shape["ROWS"] * shape["R"] * shape["S"], 4 * arch.num_sms)
    meta = {"RB": RB, "BQ": BQ, "BW": BW, "BACK": back, "BK": BK}
    return Config(meta, num_warps=4, num_stages=2 if arch.hip else 3, split=split)


def depthwise_shape(x: torch.Tensor, dy: torch.Tensor, M: int, geometry: Geometry) -> dict[str, int]:
    """The sizes that the rule asks for."""
    (R, S), (_, stride), (_, left), (_, dilation) = geometry
    return {
        "ROWS": x.shape[0] * M, "N": x.shape[1], "W": x.shape[3], "P": dy.shape[2], "Q": dy.shape[3],
        "R": R, "S": S, "STRIDE_W": stride, "LEFT": left, "DILATION_W": dilation,
    }  # fmt: skip


def depthwise_wgrad_launch(
    x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    out: torch.Tensor, config: Config, group: Sequence[int], geometry: Geometry,
) -> None:  # fmt: skip
    """Fill out [splits, K, M, R, S]; group = (input, output) channels of a group."""
    (K, N, H, W), (P, Q), (R, _) = x.shape, dy.shape[2:], geometry.kernel_size
    image, pixel, channel = image_strides(dy)
    steps = ceil_div(N * P * ceil_div(Q, config.meta["BQ"]), config.meta["BK"])
    launch(
        _depthwise_wgrad_kernel, (K * group[1], ceil_div(R, config.meta["RB"]), config.split),
        x, scale, zero, channels, dy, out, N, K * group[1], *group, image, pixel, ceil_div(steps, config.split),
        config=config, H=H, W=W, P=P, Q=Q, R=R, **geometry.constants(), CHANNEL=channel,
        PREC=dot_precision(dy.dtype), UP=INTERPRET,
    )  # fmt: skip
