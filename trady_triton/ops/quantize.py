"""Quantised compact store: the layouts of store.py in 8 or 4 bits, with a scale and a zero point for every group.

N images, K selected channels, H x W pixels, T tokens.  Element (channel j, token t) belongs
to group g = t // G with i = t % G, and  value = code * scale + zero.  A group is G = 128 tokens of a channel in CM
(the last may be shorter) and one image of a channel, G = H W, in CN.  F = half of G rounded up to a multiple
of 8 (CM: 64).

| layout           | 8 bits: uint8 codes     | 4 bits: uint8 codes                           | scale, zero |
|------------------|-------------------------|-----------------------------------------------|-------------|
| "tokens"/"pixels"| [K, T], row stride      | [K, groups * F]: byte g F + i holds tokens i  | [K, groups] |
|                  | T rounded up to 16      | (low half) and F + i of group g               |             |
| "planes"         | [K, N, H, W]            | [K, N, F]: byte i holds pixels i and F + i    | [K, N]      |

scale and zero are bf16, so that no range of an activation overflows them: zero is the minimum rounded down, scale is
(maximum - zero) / (2^bits - 1) rounded up. Codes are computed against the rounded pair, so an element errs by half a
step (to nearest) or by less than one (stochastically), and a channel that is constant and bf16 stays exact (scale 0).
Nothing of a group with NaN or infinity in it reads back as finite.  Codes past T are 0.  Stochastic rounding draws
philox value i % 8 of counter (i // 8, j, g, 0), so that a recomputation under checkpoint repeats it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from trady_triton.ops.dequantize import GROUP as GROUP
from trady_triton.ops.dequantize import dequantize_channels as dequantize_channels
from trady_triton.ops.dequantize import dequantize_channels_ref as dequantize_channels_ref
from trady_triton.ops.dequantize import group_size, half_group, units
from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.philox import random16, random16_ref
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config
from trady_triton.ops.store import (
    check_store_arguments,
    padded,
    source_strides,
    store_channels_ref,
    store_size,
    token_offset,
    viewable,
)

BITS = (8, 4)
_SMALLEST_SCALE = 1e-30

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@jit
def _load(x_ptr, base, g, i, K, j, T, sn, sp, sq, G: tl.constexpr, PQ: tl.constexpr, Q: tl.constexpr):
    t = g * G + i
    mask = (j < K)[:, None] & ((i < G) & (t < T))[None, :]
    x = tl.load(x_ptr + base[:, None] + token_offset(t, sn, sp, sq, PQ, Q)[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("inf")), mask  # the largest of a group would pass over NaN


@jit
def _codes(x, mask, zero, inverse, seed_ptr, g, i0, j, TOP: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr):
    noise = 0.5
    if seed_ptr is not None:
        counter = i0 // 8 + tl.arange(0, BT // 8)[None, :] + tl.zeros([BJ, 1], tl.int32)
        bits = random16(tl.load(seed_ptr), counter, j.to(tl.int32)[:, None], g.to(tl.int32), 0)
        noise = tl.reshape(bits, [BJ, BT]).to(tl.float32) * 1.52587890625e-05
    code = tl.floor((x - zero[:, None]) * inverse[:, None] + noise)
    return tl.where(mask, tl.minimum(tl.maximum(code, 0.0), TOP), 0.0).to(tl.int32)


@jit(do_not_specialize=["K", "groups", "row_units"])
def _quantize_kernel(
    x_ptr, channels_ptr, codes_ptr, scale_ptr, zero_ptr, seed_ptr, T, K, groups, row_units, sn, sp, sq, sc,
    G: tl.constexpr, HALF: tl.constexpr, PQ: tl.constexpr, Q: tl.constexpr, UNIT: tl.constexpr, TOP: tl.constexpr,
    HALVES: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # codes lie at j * row + position with row = row_units * UNIT
    g = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    row = row_units.to(tl.int64) * UNIT
    base = tl.load(channels_ptr + j, mask=j < K, other=0).to(tl.int64) * sc
    low = tl.full([BJ], float("inf"), tl.float32)
    high = tl.full([BJ], float("-inf"), tl.float32)
    for i0 in range(0, G, BT):
        x, mask = _load(x_ptr, base, g, i0 + tl.arange(0, BT), K, j, T, sn, sp, sq, G, PQ, Q)
        low = tl.minimum(low, tl.min(tl.where(mask, x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(mask, x, float("-inf")), axis=1))
    low = tl.where(j < K, low, 0.0)
    high = tl.where(j < K, high, 0.0)

    bits = low.to(tl.int32, bitcast=True)
    down = (bits & -65536) + tl.where((bits < 0) & (bits & 65535 != 0), 65536, 0)
    zero = down.to(tl.float32, bitcast=True)
    step = ((high - zero) * (1.0 / TOP)).to(tl.int32, bitcast=True)
    scale = ((step + 65535) & -65536).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 1e-30, scale, 0.0)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
    where = j * groups + g
    tl.store(scale_ptr + where, scale.to(tl.bfloat16), mask=j < K)
    tl.store(zero_ptr + where, zero.to(tl.bfloat16), mask=j < K)

    if HALVES:
        for i0 in range(0, HALF, BT):
            i = i0 + tl.arange(0, BT)
            x, mask = _load(x_ptr, base, g, i, K, j, T, sn, sp, sq, G, PQ, Q)
            code = _codes(x, mask & (i < HALF)[None, :], zero, inverse, seed_ptr, g, i0, j, TOP, BJ, BT)
            x, mask = _load(x_ptr, base, g, HALF + i, K, j, T, sn, sp, sq, G, PQ, Q)
            code += _codes(x, mask, zero, inverse, seed_ptr, g, HALF + i0, j, TOP, BJ, BT) << 4
            at = j[:, None] * row + g * HALF + i[None, :]
            tl.store(codes_ptr + at, code.to(tl.uint8), mask=(j < K)[:, None] & (i < HALF)[None, :])
    else:
        for i0 in range(0, G, BT):
            i = i0 + tl.arange(0, BT)
            t = g * G + i
            x, mask = _load(x_ptr, base, g, i, K, j, T, sn, sp, sq, G, PQ, Q)
            code = _codes(x, mask, zero, inverse, seed_ptr, g, i0, j, TOP, BJ, BT)
            inside = (i < G) & (t < T)
            at = j[:, None] * row + t[None, :]
            tl.store(codes_ptr + at, code.to(tl.uint8), mask=(j < K)[:, None] & inside[None, :])


def _rows(store: torch.Tensor, layout: str, G: int) -> torch.Tensor:
    """A plain store as [K, groups, G]; a short last group repeats its last token."""
    if layout == "planes":
        return store.flatten(2)
    missing = -store.shape[1] % G
    if missing:
        store = torch.cat([store, store[:, -1:].expand(-1, missing)], dim=1)
    groups: torch.Tensor = store.unflatten(1, (-1, G))
    return groups


def _parameters(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) [K, groups] in fp32, rounded outwards to bf16 values."""
    low, high = rows.amin(dim=-1), rows.amax(dim=-1)
    raw = low.contiguous().view(torch.int32)
    zero = ((raw & -65536) + ((raw < 0) & (raw & 65535 != 0)).int() * 65536).view(torch.float32)
    step = ((high - zero) * (1.0 / (2**bits - 1))).view(torch.int32)
    scale = ((step + 65535) & -65536).view(torch.float32)
    scale = torch.where(scale > _SMALLEST_SCALE, scale, torch.zeros_like(scale))
    return scale, zero


def _noise(rows: torch.Tensor, seed: torch.Tensor | None) -> float | torch.Tensor:
    if seed is None:
        return 0.5
    K, groups, G = rows.shape
    channel, group = (torch.arange(n, device=rows.device) for n in (K, groups))
    counter = torch.arange(-(-G // 8), device=rows.device).expand(K, groups, -1)
    values = random16_ref(seed, counter, channel[:, None, None], group[None, :, None], 0)
    return values.flatten(2)[..., :G].float() / 65536


def quantize_channels_ref(
    x: torch.Tensor, channels: torch.Tensor, layout: str, bits: int, stride: Sequence[int], seed: torch.Tensor | None
) -> Quantized:
    """What the op quantize_channels computes, in torch."""
    store = store_channels_ref(x, channels, layout, stride).float()
    codes, scale, zero = _empty_codes(x, store.shape, layout, bits)
    if not store.numel():
        return codes, scale, zero
    G = group_size(layout, store.shape)
    rows = _rows(store, layout, G)
    scales, zeros = _parameters(rows, bits)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    values = ((rows - zeros[..., None]) * inverse[..., None] + _noise(rows, seed)).floor_().clamp_(0, 2**bits - 1)
    _write_codes(values.to(torch.uint8), codes, store.shape, bits)
    return codes, scale.copy_(scales), zero.copy_(zeros)


def _write_codes(values: torch.Tensor, codes: torch.Tensor, size: Sequence[int], bits: int) -> None:
    """values [K, groups, G] into the bytes of the layout."""
    if bits == 8:
        codes.copy_(values.flatten(1)[:, : size[1]] if len(size) == 2 else values.view(size))
    else:
        if len(size) == 2:
            values.flatten(1)[:, size[1] :] = 0
        half = half_group(values.shape[2])
        values = F.pad(values, (0, 2 * half - values.shape[2]))
        codes.copy_((values[..., :half] | values[..., half:] << 4).view(codes.shape))


def _empty_codes(x: torch.Tensor, size: Sequence[int], layout: str, bits: int) -> Quantized:
    """Unwritten codes, scale and zero for a plain store of shape `size`."""
    half = half_group(group_size(layout, size))
    if layout == "planes":
        codes = x.new_empty(size if bits == 8 else (size[0], size[1], half), dtype=torch.uint8)
        parameters = (size[0], size[1])
    else:
        groups = (size[1] + GROUP - 1) // GROUP
        row = padded(size[1], 16)
        columns = row if bits == 8 else groups * half
        codes = x.new_empty(size[0], columns, dtype=torch.uint8)
        codes = codes[:, : size[1]] if bits == 8 else codes
        parameters = (size[0], groups)
    return codes, x.new_empty(parameters, dtype=torch.bfloat16), x.new_empty(parameters, dtype=torch.bfloat16)


@rule("quantize")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """A group of CM in one tile; larger groups are walked 128 tokens at a time."""
    return Config({"BJ": 8 if shape["K"] <= 8 else 16, "BT": 64 if shape["bits"] == 4 else 128}, num_stages=1)


def _quantize(
    x: torch.Tensor, channels: torch.Tensor, layout: str, bits: int, stride: Sequence[int], seed: torch.Tensor | None
) -> Quantized:
    if not use_triton(x) or not viewable(x, layout):
        return quantize_channels_ref(x, channels, layout, bits, stride, seed)
    K = channels.numel()
    size = store_size(x, K, layout, stride)
    codes, scale, zero = _empty_codes(x, size, layout, bits)
    if not codes.numel():
        return codes, scale, zero
    T, G = math.prod(size[1:]), group_size(layout, size)
    PQ, Q, sn, sp, sq, sc = source_strides(x, layout, stride)
    row_units, unit = units(codes.stride(0), 16)
    config = select_config("quantize", {"T": T, "K": K, "bits": bits}, x.dtype, Arch.of(x.device))
    groups = scale.shape[1]
    launch(_quantize_kernel, (groups, -(-K // config.meta["BJ"])), x, channels.contiguous(), codes, scale, zero,
           seed, T, K, groups, row_units, sn, sp, sq, sc, config=config, G=G, HALF=half_group(G), PQ=PQ, Q=Q, UNIT=unit,
           TOP=2**bits - 1, HALVES=bits == 4)  # fmt: skip
    return codes, scale, zero


def _fake(
    x: torch.Tensor, channels: torch.Tensor, layout: str, bits: int, stride: Sequence[int], seed: torch.Tensor | None
) -> Quantized:
    return _empty_codes(x, store_size(x, channels.numel(), layout, stride), layout, bits)


_op = register_op(
    "quantize_channels(Tensor x, Tensor channels, str layout, int bits, SymInt[] stride, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor)",
    _quantize,
    _fake,
)


def quantize_channels(
    x: torch.Tensor, channels: torch.Tensor, layout: str, bits: int, stride: Sequence[int] = (1, 1),
    seed: torch.Tensor | None = None,
) -> Quantized:  # fmt: skip
    """(codes, scale, zero) of the selected channels of x, as the table above; arguments as for `store_channels`.

    bits: 8 or 4.   seed: int64 of one element; rounds stochastically (unbiased), else to nearest.
    Raises: ValueError for bits or a layout that are not there, and what `store_channels` raises.
    """
    check_store_arguments(x, layout, stride)
    if layout == "taps":
        raise ValueError("layout of a quantised store: got 'taps', wanted 'tokens', 'pixels' or 'planes'")
    if bits not in BITS:
        raise ValueError(f"bits of a quantised store: got {bits}, wanted 8 or 4")
    codes, scale, zero = _op(x, channels, layout, bits, stride, seed)
    return codes, scale, zero


def quantized_bytes(layout: str, size: Sequence[int], bits: int) -> int:
    """Bytes of codes, scale and zero for a plain store of shape `size`."""
    G = group_size(layout, size)
    if layout == "planes":
        return size[0] * size[1] * ((G if bits == 8 else half_group(G)) + 4)
    groups = -(-size[1] // GROUP)
    return size[0] * ((padded(size[1], 16) if bits == 8 else groups * half_group(G)) + 4 * groups)


def quantize_traffic_bytes(layout: str, size: Sequence[int], bits: int, itemsize: int) -> int:
    """Bytes that a perfect quantiser moves: the store of shape `size` read once; codes, scale and zero written."""
    return math.prod(size) * itemsize + quantized_bytes(layout, size, bits)
