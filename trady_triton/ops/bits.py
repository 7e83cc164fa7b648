"""Eight booleans, or four numbers below 4, a byte, in torch: masks and codes as they wait for the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))  # times eight bytes 0/1: byte i becomes bit i of the top byte
_GATHER_PAIRS = sum(1 << (24 - 6 * i) for i in range(4))  # times four bytes 0..3: byte i becomes bits 2i and 2i + 1
_REPEAT = sum(1 << 8 * i for i in range(8))
_SPREAD = sum(1 << 9 * i for i in range(8)) - (1 << 64)


def pack(values: Tensor, bits: int) -> Tensor:
    """Bytes 0 .. 2^bits - 1 [n], a whole number of codes, to uint8 [n * bits / 8], little endian; overwrites `values`.

    One integer product each: without carries, it gathers the bits in its top byte.
    """
    if bits == 1:
        return values.view(torch.int64).mul_(_GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)
    return values.view(torch.int32).mul_(_GATHER_PAIRS).bitwise_right_shift_(24).to(torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """Bools that are dense, in any order of dimensions -> uint8 [ceil(n / 8)], in memory order; overwrites the mask."""
    flat = mask.as_strided((mask.numel(),), (1,))
    if torch.compiler.is_compiling():  # which forgets what is written through a view by as_strided
        flat = flat.clone()
    return pack(F.pad(flat, (0, -flat.numel() % 8)) if flat.numel() % 8 else flat, 1)


def spread_bits(code: Tensor) -> Tensor:
    """Packed bits as bytes [8 * n], 0 where the bit is not set."""
    return code.to(torch.int64).mul_(_REPEAT).bitwise_and_(_SPREAD).view(torch.uint8)


def unpack_bits(code: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The mask that `pack_bits` packed, given its shape and strides, as uint8: 0 is False, all else True."""
    return spread_bits(code).as_strided(shape, strides)
