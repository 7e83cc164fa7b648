"""Activation, its packed derivative and the compact store of its output in one pass over a channels-last x.

T tokens or pixels, C channels (a multiple of 8), K selected channels.  y and code as in act_pack.py, the store as in
store.py: CM [K, T] for "tokens" and for "pixels" of stride 1, PM [N, H, W, Kp] for "taps".  `slots` [C] int32 says
where a channel is stored, -1 when it is not selected. To gather random channels of a channels-last x costs most of
its bytes; here they are read once anyway.
"""

from __future__ import annotations

import torch

from trady_triton.ops.act_pack import (
    act_pack_ref,
    check_bits,
    code_bytes,
    code_constants,
    derivative_code,
    has_kernel,
    pack_bytes,
)
from trady_triton.ops.activation import activate, bounds
from trady_triton.ops.dispatch import jit, launch, tl
from trady_triton.ops.library import register_op
from trady_triton.ops.philox import random16
from trady_triton.ops.select_config import Arch, Config, Shape, rule, select_config
from trady_triton.ops.store import check_store_arguments, empty_store, store_bytes, store_channels_ref, store_size

FUSED_LAYOUTS = ("tokens", "pixels", "taps")

Fused = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@jit(do_not_specialize=["row_units", "low", "high"])
def _act_store_kernel(
    x_ptr, y_ptr, code_ptr, slots_ptr, store_ptr, seed_ptr, T, row_units, low, high,
    C: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, PIXEL_MAJOR: tl.constexpr, UNIT: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 // BITS
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c0 = tl.program_id(1).to(tl.int64) * BC
    c = c0 + tl.arange(0, BC)
    mask = (t < T)[:, None] & (c < C)[None, :]
    at = t[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)  # [BT, BC]
    y, d = activate(x.to(tl.float32), low, high, KIND)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=mask)

    slot = tl.load(slots_ptr + c, mask=c < C, other=-1).to(tl.int64)
    row = row_units.to(tl.int64) * UNIT
    place = t[:, None] * row + slot[None, :] if PIXEL_MAJOR else slot[None, :] * row + t[:, None]
    tl.store(store_ptr + place, y, mask=mask & (slot >= 0)[None, :])

    noise = 0.5
    if seed_ptr is not None:
        counter = ((t * (C // 8))[:, None] + (c0 // 8 + tl.arange(0, BC // 8))[None, :]).to(tl.int32)
        noise = tl.reshape(random16(tl.load(seed_ptr), counter, 0, 0, 0), [BT, BC]).to(tl.float32) * 1.52587890625e-05
    code = derivative_code(d, noise, ZERO, SCALE, T0, T1, T2, BITS)
    if PER > 1:
        code = tl.sum(tl.reshape(code, [BT, BC // PER, PER]) << (tl.arange(0, PER) * BITS)[None, None, :], axis=2)
    byte = c0 // PER + tl.arange(0, BC // PER)
    inside = (t < T)[:, None] & (byte < C // PER)[None, :]
    tl.store(code_ptr + t[:, None] * (C // PER) + byte[None, :], code.to(tl.uint8), mask=inside)


def fusable(x: torch.Tensor, layout: str) -> bool:
    """Whether x lies as the fused kernel needs it; otherwise the op takes two passes."""
    if layout == "tokens":
        return x.shape[-1] % 8 == 0 and x.is_contiguous()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return layout in FUSED_LAYOUTS and x.shape[1] % 8 == 0 and channels_last


def channel_slots(channels: torch.Tensor, num_channels: int) -> torch.Tensor:
    """slots [C] int32: the inverse of `channels`, -1 where a channel is not selected; build it once a resample."""
    slots = torch.full((num_channels,), -1, dtype=torch.int32, device=channels.device)
    slots[channels.long()] = torch.arange(channels.numel(), dtype=torch.int32, device=channels.device)
    return slots


def act_store_ref(
    x: torch.Tensor, channels: torch.Tensor, slots: torch.Tensor, layout: str, kind: str, bits: int,
    low: float, high: float, seed: torch.Tensor | None,
) -> Fused:  # fmt: skip
    """What the op act_store computes, in two passes of torch."""
    y, code = act_pack_ref(x, kind, bits, low, high, seed)
    return y, code, store_channels_ref(y, channels, layout)


@rule("act_store")
def _rule(shape: Shape, dtype: torch.dtype, arch: Arch) -> Config:
    """2048 elements a program: what erf and exp leave registers for; 64 channels are two full sectors of bf16."""
    return Config({"BT": 32, "BC": 64}, num_warps=4, num_stages=1)


def _act_store(
    x: torch.Tensor, channels: torch.Tensor, slots: torch.Tensor, layout: str, kind: str, bits: int,
    low: float, high: float, seed: torch.Tensor | None,
) -> Fused:  # fmt: skip
    if not has_kernel(x):
        return act_store_ref(x, channels, slots, layout, kind, bits, low, high, seed)
    if not fusable(x, layout):
        y, code = torch.ops.trady.act_pack.default(x, kind, bits, low, high, seed)
        return y, code, torch.ops.trady.store_channels.default(y, channels, layout, [1, 1])
    y, code, store = _empty(x, channels, layout, bits)
    C = x.shape[-1 if layout == "tokens" else 1]
    T = x.numel() // C
    if layout == "taps":
        store.zero_()  # the padding channels, and everything when nothing is selected
    if T:
        config = select_config("act_store", {"T": T, "C": C}, x.dtype, Arch.of(x.device))
        row = store.shape[3] if layout == "taps" else T
        unit = 8 if row % 8 == 0 else 1
        grid = (-(-T // config.meta["BT"]), -(-C // config.meta["BC"]))
        launch(_act_store_kernel, grid, x, y, code, slots.contiguous(), store, seed, T, row // unit, low, high,
               config=config, C=C, KIND=kind, PIXEL_MAJOR=layout == "taps", UNIT=unit,
               **code_constants(kind, bits))  # fmt: skip
    return y, code, store


def _empty(x: torch.Tensor, channels: torch.Tensor, layout: str, bits: int) -> Fused:
    code = x.new_empty(code_bytes(x.numel(), bits), dtype=torch.uint8)
    size = store_size(x, channels.numel(), layout, (1, 1))
    return torch.empty_like(x), code, empty_store(x, size, layout, x.dtype)


def _fake(
    x: torch.Tensor, channels: torch.Tensor, slots: torch.Tensor, layout: str, kind: str, bits: int,
    low: float, high: float, seed: torch.Tensor | None,
) -> Fused:  # fmt: skip
    return _empty(x, channels, layout, bits)


_op = register_op(
    "act_store(Tensor x, Tensor channels, Tensor slots, str layout, str kind, int bits, float low, float high, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _act_store,
    _fake,
)


def act_store(
    x: torch.Tensor, channels: torch.Tensor, slots: torch.Tensor, layout: str, kind: str, bits: int,
    low: float | None = None, high: float | None = None, seed: torch.Tensor | None = None,
) -> Fused:  # fmt: skip
    """(y, code, store of y): `act_pack` and `store_channels` in one; slots = channel_slots(channels, C).

    Takes any x and layout; where `fusable` says no it takes two passes with the same result.
    Raises: ValueError as `act_pack` and `store_channels`, and for slots of another length than C.
    """
    lower, upper = bounds(kind, low, high)
    check_bits(kind, bits, seed)
    check_store_arguments(x, layout, (1, 1))
    C = x.shape[-1 if layout == "tokens" else 1]
    if slots.numel() != C:
        raise ValueError(f"slots: got {slots.numel()}, wanted one for each of the {C} channels")
    y, code, store = _op(x, channels, slots, layout, kind, bits, lower, upper, seed)
    return y, code, store


def act_store_bytes(
    layout: str, num_tokens: int, num_channels: int, num_selected: int, itemsize: int, bits: int
) -> int:
    """Bytes that the fused pass moves: those of `act_pack`, the slots read and the store written."""
    packed = pack_bytes(num_tokens * num_channels, itemsize, bits)
    return packed + 4 * num_channels + store_bytes(layout, num_selected, num_tokens, itemsize)
