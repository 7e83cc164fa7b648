"""Weight gradient of the selected input channels of a Linear or 1x1 convolution.

T tokens or kept pixels, K selected channels, O out, S splits of T.   store [K, T], dy [..., O] or [N, O, P, Q].
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from trady_triton.ops.dequantize import GROUP, dequantize_channels_ref, dequantize_impl
from trady_triton.ops.dispatch import INTERPRET, deterministic, jit, launch, takes_library, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.quantize import quantized_bytes
from trady_triton.ops.select_config import (
    MAX_WORKSPACE_BYTES,
    Arch,
    Config,
    Shape,
    next_power_of_2,
    rule,
    select_config,
    split_count,
)
from trady_triton.ops.splitk_reduce import splitk_reduce_launch
from trady_triton.ops.tile import dot_precision, load_tokens, tile_dot
from trady_triton.ops.token_layout import TokenLayout, as_batches, out_of_int32, token_layout
from trady_triton.ops.token_matmul import token_matmul
from trady_triton.ops.workspace import workspace


@jit
def _load_x(x_ptr, row, keep_row, t, T, UP: tl.constexpr, MASKED: tl.constexpr):  # -> [BM, tokens]
    keep = keep_row[:, None]
    if MASKED:
        keep = keep & (t < T)[None, :]
    x = tl.load(x_ptr + row[:, None] + t[None, :], mask=keep, other=0.0)
    return x.to(tl.float32) if UP else x


@jit
def _load_range(scale_ptr, zero_ptr, j, keep_row, g, n_groups, WIDE: tl.constexpr):  # [BM, 1] each
    at = (j.to(tl.int64) if WIDE else j) * n_groups + g
    scale = tl.load(scale_ptr + at, mask=keep_row, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=keep_row, other=0.0).to(tl.float32)
    return scale[:, None], zero[:, None]


@jit
def _dequantize(codes, scale, zero, like):
    # tokens past T become the zero point, a finite number that meets a gradient of 0
    return (codes.to(tl.float32) * scale + zero).to(like.dtype)


@jit
def _product(x, dy, acc, is_ones, ONES: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr):
    if ONES:
        x = tl.where(is_ones[:, None], 1.0, x).to(x.dtype)
    return tile_dot(x, dy, acc, PREC, UP)


@jit
def _accumulate(
    acc, x_ptr, scale_ptr, zero_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel, n_groups,
    PQ: tl.constexpr, CHANNEL: tl.constexpr, WIDE: tl.constexpr, ONES: tl.constexpr, MASKED: tl.constexpr,
    BITS: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BK) if BITS != 4 else tl.arange(0, BK // 2)
    dy = load_tokens(dy_ptr, t0 + i, c, T, O, image, pixel, PQ, CHANNEL, WIDE, MASKED)
    if UP:
        dy = dy.to(tl.float32)
    if BITS == 0:
        x = _load_x(x_ptr, row, j < K, t0 + i, T, UP, MASKED)
    elif BITS == 8:
        codes = _load_x(x_ptr, row, j < K, t0 + i, T, False, MASKED)
        scale, zero = _load_range(scale_ptr, zero_ptr, j, j < K, t0 // G, n_groups, WIDE)
        x = _dequantize(codes, scale, zero, dy)
    else:  # BK = G: byte i of a group holds its tokens i (low) and G/2 + i
        codes = _load_x(x_ptr, row, j < K, t0 // 2 + i, T, False, False)
        scale, zero = _load_range(scale_ptr, zero_ptr, j, j < K, t0 // G, n_groups, WIDE)
        high = _dequantize(codes >> 4, scale, zero, dy)
        dy_high = load_tokens(dy_ptr, t0 + BK // 2 + i, c, T, O, image, pixel, PQ, CHANNEL, WIDE, MASKED)
        acc = _product(high, dy_high, acc, j == K, ONES, PREC, UP)
        x = _dequantize(codes & 15, scale, zero, dy)
    return _product(x, dy, acc, j == K, ONES, PREC, UP)


@jit(do_not_specialize=["K", "row_units", "n_groups", "blocks_per_split"])
def _token_wgrad_kernel(
    x_ptr, scale_ptr, zero_ptr, dy_ptr, out_ptr, T, O, K, row_units, image, pixel, n_groups, blocks_per_split,
    PQ: tl.constexpr, CHANNEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ONES: tl.constexpr,
    PEEL: tl.constexpr, ATOMIC: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    # out [S, M, O]; M = K, or K + 1 with ONES: a row of ones below the store makes row K the bias gradient
    M = K + 1 if ONES else K
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    j = tile % tiles_m * BM + tl.arange(0, BM)
    c = tile // tiles_m * BN + tl.arange(0, BN)
    # a row stride given in units of 8 tells the compiler that rows are aligned, although K and T may be anything
    row = (j.to(tl.int64) if WIDE else j) * (row_units * UNIT)
    begin = split * blocks_per_split * BK
    end = tl.minimum(begin + blocks_per_split * BK, T)
    # Masks by a T that is no multiple of 16 would make every load scalar: there only the last tile gets one (PEEL).
    full = tl.maximum(tl.minimum(end, T // BK * BK), begin) if PEEL else end
    acc = tl.zeros([BM, BN], tl.float32)
    for t0 in range(begin, full, BK):
        acc = _accumulate(acc, x_ptr, scale_ptr, zero_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel, n_groups,
                          PQ, CHANNEL, WIDE, ONES, not PEEL, BITS, G, BK, PREC, UP)  # fmt: skip
    if PEEL:
        for t0 in tl.range(full, end, BK, num_stages=1):
            acc = _accumulate(acc, x_ptr, scale_ptr, zero_ptr, dy_ptr, row, j, c, t0, T, O, K, image, pixel, n_groups,
                              PQ, CHANNEL, WIDE, ONES, True, BITS, G, BK, PREC, UP)  # fmt: skip
    first = 0 if ATOMIC else split.to(tl.int64) * M
    out = out_ptr + (first + j)[:, None] * O + c[None, :]
    inside = (j < M)[:, None] & (c < O)[None, :]
    if ATOMIC:
        tl.atomic_add(out, acc, mask=inside, sem="relaxed")
    else:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def token_wgrad_ref(
    store: torch.Tensor,
    dy: torch.Tensor,
    channel_dim: int = -1,
    *,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    bits: int = 0,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = True,
    ones_row: bool = False,
) -> torch.Tensor:
    """What `token_wgrad` computes, by matrix products of torch (cuBLAS on a GPU) over views of dy."""
    batches = as_batches(dy, channel_dim)
    if scale is not None and zero is not None:
        size = (store.shape[0], batches.shape[:2].numel())
        store = dequantize_channels_ref(store, scale, zero, "tokens", bits, size, dy.dtype)
    x = store.view(store.shape[0], *batches.shape[:2]).transpose(0, 1)
    out = token_matmul(x, batches)
    if ones_row:
        out = torch.cat([out, batches.sum((0, 1), dtype=out.dtype)[None]])
    return out.to(out_dtype)


def _tiles(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    bits, planes, exact = shape["bits"], shape["PQ"] > 1, dtype == torch.float32
    anywhere = planes and shape["PQ"] % 4 != 0  # rows may start at any address: one for each element
    # wider tiles, or fewer warps, would need too many registers
    most = 64 if exact or (bits == 4 and planes) else 128 if bits else 256
    BM = min(max(next_power_of_2(shape["K"]), 16), most)
    narrow = BM == 256 or anywhere or (planes and (BM == 16 or bits == 4))
    least = 64 if BM == 256 else 32
    BN = min(max(next_power_of_2(shape["O"]), least), 32 if exact or (anywhere and bits) else 64 if narrow else 128)
    BK = GROUP if bits == 4 else 32 if exact else 64
    few = BM >= 128 or bits == 4 or exact or (planes and BM == 32)
    if exact:
        warps = 8 if BM * BN >= 2048 else 4
    elif bits:
        warps = 4 if BM in (16, 64) else 8
    else:
        warps = 8 if BM * BN >= 16384 or (BM >= 128 and (anywhere or (planes and BN == 32))) else 4
    return Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=warps, num_stages=2 if arch.hip else 3 if few else 4)


@rule("token_wgrad")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """One pass over dy where K allows it; as many splits of T as fill the device for little more traffic.

    More than 256 channels are bound by arithmetic, and fp32 has no fast transposed operand: cuBLAS is better there,
    unless planes of small images make many small products of it. Codes of fp32 are always read back for cuBLAS.
    """
    tiles = _tiles(shape, dtype, arch)
    T, O, K = shape["T"], shape["O"], shape["K"]
    BM, BN, BK = (tiles.meta[name] for name in ("BM", "BN", "BK"))
    slots = (2 if BM <= 64 else 1) * arch.num_sms
    step_bytes = BK * (BM * (shape["bits"] or 8 * dtype.itemsize) // 8 + BN * dtype.itemsize)
    split = split_count(-(-K // BM) * -(-O // BN), T // BK, step_bytes, 4 * K * O, slots)
    images_at_once = max(1, MAX_WORKSPACE_BYTES // (4 * K * O))
    products = 1 if shape["PQ"] == 1 else T / shape["PQ"] / images_at_once
    exact = dtype == torch.float32
    mm = ((K > 256 or exact) and products <= 8) or (exact and shape["bits"] > 0)
    return replace(tiles, split=split, backend="mm" if mm else "triton")


class _Operands(NamedTuple):
    """What every launch over one (store, dy) has in common; M is K, or K + 1 with a row of ones."""

    store: torch.Tensor
    dy: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    bits: int
    layout: TokenLayout
    M: int


def _launch(operands: _Operands, out: torch.Tensor, config: Config) -> None:
    """Fill out: [S, M, O] partials, or the [M, O] result; splits of the latter are added by atomics."""
    store, dy, scale, zero, bits, layout, M = operands
    BM, BN, BK = (config.meta[name] for name in ("BM", "BN", "BK"))
    K, T, split = store.shape[0], layout.T, config.split
    unit = math.gcd(store.stride(0), 16 if bits else 8)
    launch(
        _token_wgrad_kernel, (-(-M // BM) * -(-layout.O // BN), split),
        store, scale, zero, dy, out, T, layout.O, K, store.stride(0) // unit, layout.image, layout.pixel,
        0 if scale is None else scale.shape[1], -(-T // (BK * split)),
        config=config, PQ=layout.PQ, CHANNEL=layout.channel, UNIT=unit, WIDE=out_of_int32(store, dy), ONES=M > K,
        PEEL=T % 16 != 0, ATOMIC=out.dim() == 2 and split > 1, BITS=bits, G=GROUP, PREC=dot_precision(dy.dtype),
        UP=INTERPRET,
    )  # fmt: skip


def _run(operands: _Operands, out_dtype: torch.dtype, two_pass: bool, config: Config) -> torch.Tensor:
    size, device = (operands.M, operands.layout.O), operands.dy.device
    if config.split > 1 and not two_pass:
        added = torch.zeros(size, dtype=torch.float32, device=device)
        _launch(operands, added, config)
        return added.to(out_dtype)
    out = torch.empty(size, dtype=out_dtype, device=device)
    if config.split == 1:
        _launch(operands, out, config)
        return out
    partials = workspace(device, config.split * out.numel()).view(config.split, *size)
    _launch(operands, partials, config)
    return splitk_reduce_launch(out, partials.flatten(1))


def _impl(
    store: torch.Tensor, dy: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, bits: int,
    channel_dim: int, out_dtype: torch.dtype, two_pass: bool, ones_row: bool,
) -> torch.Tensor:  # fmt: skip
    M, layout = store.shape[0] + int(ones_row), token_layout(dy, channel_dim)
    if M > 0 and dy.numel() > 0 and dy.dtype != torch.float64 and use_triton(dy):
        if layout is None:
            dy = dy.contiguous()
            layout = cast(TokenLayout, token_layout(dy, channel_dim))
        planes = layout.PQ if layout.PQ > 1 or layout.channel == 1 else layout.T  # those of one image are one
        shape = {"T": layout.T, "O": layout.O, "K": M, "PQ": planes, "bits": bits}
        config = select_config("token_wgrad", shape, dy.dtype, Arch.of(dy.device))
        if not takes_library(config):
            if scale is not None and zero is not None:
                scale, zero = scale.contiguous(), zero.contiguous()
            operands = _Operands(store, dy, scale, zero, bits, layout, M)
            return _run(operands, out_dtype, two_pass or deterministic(False), config)
        if scale is not None and zero is not None:  # by the kernel, not the twin
            size = store.shape[0], layout.T
            store, scale, zero = dequantize_impl(store, scale, zero, "tokens", bits, size, dy.dtype), None, None
    return token_wgrad_ref(
        store, dy, channel_dim, scale=scale, zero=zero, bits=bits, out_dtype=out_dtype, ones_row=ones_row
    )


def _fake(
    store: torch.Tensor, dy: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, bits: int,
    channel_dim: int, out_dtype: torch.dtype, two_pass: bool, ones_row: bool,
) -> torch.Tensor:  # fmt: skip
    return dy.new_empty(store.shape[0] + int(ones_row), dy.shape[channel_dim], dtype=out_dtype)


def token_wgrad_flops(
    store_shape: torch.Size, dy_shape: torch.Size, scale: Any, zero: Any, bits: int, *_: Any, **__: Any
) -> int:
    """2 T K O."""
    return 2 * store_shape[0] * math.prod(dy_shape)


def token_wgrad_bytes(T: int, O: int, K: int, itemsize: int, bits: int = 0, out_itemsize: int = 4) -> int:
    """Bytes that a perfect kernel moves: the store (with its scales) and dy read once, the result written."""
    store = quantized_bytes("tokens", (K, T), bits) if bits else K * T * itemsize
    return store + itemsize * T * O + out_itemsize * K * O


_op = register_op(
    "token_wgrad(Tensor store, Tensor dy, Tensor? scale, Tensor? zero, int bits, int channel_dim, "
    "ScalarType out_dtype, bool two_pass, bool ones_row) -> Tensor",
    _impl,
    _fake,
    token_wgrad_flops,
)


def token_wgrad(
    store: torch.Tensor,
    dy: torch.Tensor,
    channel_dim: int = -1,
    *,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    bits: int = 0,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = True,
    ones_row: bool = False,
) -> torch.Tensor:
    """Compact weight gradient store @ dy over tokens: [K, O] in `out_dtype`, accumulated in fp32.

    store: [K, T] of dy's dtype, rows at any stride, or the codes of quantize_channels ("tokens", "pixels") with their
    `scale`, `zero` and `bits`; dy: [..., O] with `channel_dim` -1, or [N, O, P, Q] in any memory format with
    `channel_dim` 1, read in place. `ones_row` appends the bias gradient as row K for no extra read of dy.
    Repeatable bit for bit, unless `deterministic` is False: then splits are added by atomics.
    Raises: ValueError for sizes, dtypes, bits or a channel_dim that do not fit.
    """
    if channel_dim not in (-1, 1):
        raise ValueError(f"channel_dim: got {channel_dim}, wanted -1 ([..., O]) or 1 ([N, O, P, Q])")
    _check_store(store, dy, dy.shape[channel_dim], bits)
    if (bits != 0) != (scale is not None and zero is not None):
        raise ValueError(f"scale and zero: wanted both for 4 or 8 bits and neither for bits = 0, got bits = {bits}")
    groups = store.shape[0], -(-dy.numel() // max(dy.shape[channel_dim], 1) // GROUP)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and dy.shape[channel_dim] > 0 and tensor.shape != groups:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}, wanted {groups}")
    out: torch.Tensor = _op(store, dy, scale, zero, bits, channel_dim, out_dtype, deterministic, ones_row)
    return out


def _check_store(store: torch.Tensor, dy: torch.Tensor, O: int, bits: int) -> None:
    if bits not in (0, 4, 8):
        raise ValueError(f"bits: got {bits}, wanted 0 (not quantised), 4 or 8")
    dtype = torch.uint8 if bits else dy.dtype
    if store.dtype != dtype or (store.shape[-1] > 1 and store.stride(-1) != 1):
        raise ValueError(f"store: got {store.dtype}, strides {store.stride()}, wanted {dtype}, unit last stride")
    T = dy.numel() // max(O, 1)
    columns = -(-T // GROUP) * GROUP // 2 if bits == 4 else T
    if store.dim() != 2 or (O > 0 and store.shape[1] != columns):
        raise ValueError(f"store: got {tuple(store.shape)}, wanted [K, {columns}] for dy {tuple(dy.shape)}")
