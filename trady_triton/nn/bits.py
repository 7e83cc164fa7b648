"""Eight booleans a byte: masks as they are kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Eight bytes of 0 or 1, read as one 64-bit word, times _GATHER have bit i = byte i in the top byte, without carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))
_REPEAT = sum(1 << 8 * i for i in range(8))
_SPREAD = sum(1 << 9 * i for i in range(8)) - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Bools, freshly computed (so dense, in any order of dimensions) -> uint8 [ceil(numel / 8)], in memory order."""
    flat = mask.as_strided((mask.numel(),), (1,))
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The mask that `pack_bits` packed, given its shape and strides, as uint8: 0 is False, all else True."""
    words = bits.to(torch.int64).mul_(_REPEAT).bitwise_and_(_SPREAD)
    return words.view(torch.uint8).as_strided(shape, strides)
