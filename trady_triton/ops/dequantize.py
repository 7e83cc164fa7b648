"""Reads a quantised compact store back into the layouts of store.py; quantize.py says how it is packed.

K selected channels, T tokens, G tokens a group, F = half of G rounded up to a multiple of 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config
from trady_triton.ops.store import empty_store, padded

GROUP = 128


@jit(do_not_specialize=["K", "groups", "row_units", "out_units"])
def _dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr, T, K, groups, row_units, out_units,
    G: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, HALVES: tl.constexpr,
    BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[None, :]
    j = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)[:, None]
    row = row_units.to(tl.int64) * UNIT
    out_row = out_units.to(tl.int64) * OUT_UNIT
    mask = (j < K) & (t < T)
    g, i = t // G, t % G
    if HALVES:
        code = tl.load(codes_ptr + j * row + g * HALF + i % HALF, mask=mask, other=0).to(tl.int32)
        code = (code >> (i // HALF * 4).to(tl.int32)) & 15
    else:
        code = tl.load(codes_ptr + j * row + t, mask=mask, other=0).to(tl.int32)
    where = j * groups + g
    scale = tl.load(scale_ptr + where, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + j * out_row + t, (code.to(tl.float32) * scale + zero).to(out_ptr.dtype.element_ty), mask=mask)


def group_size(layout: str, size: Sequence[int]) -> int:
    """G, from the shape of the plain store."""
    return size[2] * size[3] if layout == "planes" else GROUP


def half_group(G: int) -> int:
    """F: tokens in each half of a group whose two halves share bytes."""
    return padded((G + 1) // 2)


def units(row: int, most: int) -> tuple[int, int]:
    """(row // unit, unit): the largest unit up to `most` that divides a row, as a constant that proves alignment."""
    unit = math.gcd(row, most)
    return row // unit, unit


def dequantize_channels_ref(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: str, bits: int, size: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What `dequantize_channels` computes, in torch."""
    store = empty_store(codes, size, layout, dtype)
    if not store.numel():
        return store
    G, T = group_size(layout, size), math.prod(size[1:])
    if bits == 4:
        values = codes.view(*scale.shape, -1)
        values = torch.cat([values & 15, values >> 4], dim=-1)[..., :G]
    else:
        values = F.pad(codes.flatten(1), (0, scale.shape[1] * G - T)).unflatten(1, (-1, G))
    return store.copy_((values * scale.float()[..., None] + zero.float()[..., None]).flatten(1)[:, :T].reshape(size))


@rule("dequantize")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """Tiles as in the copying store."""
    return Config({"BJ": 8 if shape["K"] <= 8 else 16, "BT": 128}, num_stages=1)


def dequantize_impl(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: str, bits: int, size: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The op, for callers that are inside one already."""
    if not use_triton(codes):
        return dequantize_channels_ref(codes, scale, zero, layout, bits, size, dtype)
    out = empty_store(codes, size, layout, dtype)
    if not out.numel():
        return out
    scale, zero = scale.contiguous(), zero.contiguous()
    K, T, G = size[0], math.prod(size[1:]), group_size(layout, size)
    (row_units, unit), (out_units, out_unit) = (units(tensor.stride(0), 16) for tensor in (codes, out))
    config = select_config("dequantize", {"T": T, "K": K}, dtype, Arch.of(codes.device))
    grid = (-(-T // config.meta["BT"]), -(-K // config.meta["BJ"]))
    launch(_dequantize_kernel, grid, codes, scale, zero, out, T, K, scale.shape[1], row_units, out_units,
           config=config, G=G, HALF=half_group(G), UNIT=unit, OUT_UNIT=out_unit, HALVES=bits == 4)  # fmt: skip
    return out


def _fake(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: str, bits: int, size: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return empty_store(codes, size, layout, dtype)


_op = register_op(
    "dequantize_channels(Tensor codes, Tensor scale, Tensor zero, str layout, int bits, SymInt[] size, "
    "ScalarType dtype) -> Tensor",
    dequantize_impl,
    _fake,
)


def dequantize_channels(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: str, bits: int, size: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The store that `store_channels` would have returned, up to the rounding; `size` is its shape."""
    store: torch.Tensor = _op(codes, scale, zero, layout, bits, size, dtype)
    return store
