"""The derivative of a smooth activation in 8 or 2 bits an element.

8 bits: derivative = (code - zero) / scale, a grid on which 0 and 1 lie, so that dead and saturated elements stay exact.
2 bits: the nearest of four levels, those of least squared error for a standard normal input: another derivative.
Codes lie in the memory order of x, so that channels_last needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trady_triton.nn.bits import pack_bits, unpack_bits
from trady_triton.nn.parts import parts

_aten = torch.ops.aten


@dataclass(frozen=True)
class Code:
    """`derivative(ones, x)` is torch's own backward; `zero` is the 8-bit code of 0, `levels` are those of 2 bits."""

    derivative: Callable[[Tensor, Tensor], Tensor]
    zero: int
    levels: tuple[float, float, float, float]

    @property
    def scale(self) -> int:
        """Codes from derivative 0 to 1; the range is symmetric about 1/2."""
        return 255 - 2 * self.zero


CODES = {  # ranges: GELU [-0.1290, 1.1290], SiLU [-0.0998, 1.0998], Hardswish [-0.5, 1.5]
    "gelu": Code(_aten.gelu_backward, 27, (-0.0463, 0.3129, 0.6876, 1.0465)),
    "gelu_tanh": Code(
        lambda ones, x: _aten.gelu_backward(ones, x, approximate="tanh"), 27, (-0.0463, 0.3129, 0.6876, 1.0464)
    ),
    "silu": Code(_aten.silu_backward, 22, (0.0335, 0.3445, 0.6556, 0.9665)),
    "hardswish": Code(_aten.hardswish_backward, 64, (0.0061, 0.3515, 0.6487, 0.9939)),
}


def pack_derivative(x: Tensor, kind: str, bits: int) -> tuple[Tensor, tuple[int, ...]]:
    """Codes of the derivative at x, [numel * bits / 8] uint8, and the strides of the tensor that they belong to."""
    code = torch.empty_like(x, dtype=torch.uint8)
    for part, out in parts(x, code):
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        slope = CODES[kind].derivative(wide.new_ones(()).expand_as(wide), wide)
        out.copy_(_encode(slope, CODES[kind], bits))
    flat = code.as_strided((code.numel(),), (1,))
    return (flat if bits == 8 else _pack_pairs(flat)), code.stride()


def unpack_derivative(dy: Tensor, code: Tensor, kind: str, bits: int, strides: Sequence[int]) -> Tensor:
    """dY times the packed derivative; dY may have any layout."""
    if bits == 2:
        code = _unpack_pairs(code, dy.numel())
    code = code.as_strided(dy.shape, strides)
    dx = torch.empty_like(dy)
    for grad, part, out in parts(dy, code, dx):
        slope = _decode(part, CODES[kind], bits, torch.promote_types(dy.dtype, torch.float32))
        torch.mul(grad, slope, out=out)
    return dx


def _encode(slope: Tensor, code: Code, bits: int) -> Tensor:
    if bits == 8:
        return slope.mul_(code.scale).add_(code.zero + 0.5).clamp_(0, 255).floor_()
    middles = [(low + high) / 2 for low, high in zip(code.levels, code.levels[1:], strict=False)]
    level = (slope > middles[0]).to(torch.uint8)
    for middle in middles[1:]:
        level += slope > middle
    return level


def _decode(part: Tensor, code: Code, bits: int, dtype: torch.dtype) -> Tensor:
    if bits == 8:
        return part.to(dtype).sub_(code.zero).div_(code.scale)
    return torch.tensor(code.levels, dtype=dtype, device=part.device)[part.int()]


def _pack_pairs(values: Tensor) -> Tensor:
    """Bytes 0 .. 3 [n] -> uint8 [2, ceil(n / 8)]: the low bits, then the high ones."""
    return torch.stack([pack_bits((values & bit).ne(0)) for bit in (1, 2)])


def _unpack_pairs(packed: Tensor, count: int) -> Tensor:
    low, high = (unpack_bits(plane, (count,), (1,)).ne(0) for plane in packed)
    return low.to(torch.uint8) + 2 * high
