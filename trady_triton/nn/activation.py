"""Piecewise linear activations that keep one bit an element: where the slope is the lesser one.

The bit is computed from the input before the activation runs, so an in-place module stays in place: its caller may
count on the change of x, as in pre-activation networks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.bits import pack_bits, unpack_bits
from trady_triton.nn.graph import builds_graph

_ONE_SIXTH = 0.1666666716337204  # the slope of torch's hardsigmoid in every dtype: 1/6 rounded to float32


class _TwoSlopes(torch.autograd.Function):
    """y = run(x), whose derivative is `flat` up to `low` and from `high` on, and `steep` between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], low: float, high: float, steep: float, flat: float
    ) -> Tensor:
        bits, ctx.layout = _pack_outside(x, low, high)
        ctx.save_for_backward(bits)
        ctx.slopes = steep, flat
        y = run(x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        steep, flat = ctx.slopes
        dx = _select(dy, unpack_bits(bits.bitwise_not(), *ctx.layout), flat)
        return dx if steep == 1 else dx.mul_(steep), None, None, None, None, None


class LeanReLU(nn.ReLU):
    """nn.ReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        y: Tensor = _TwoSlopes.apply(input, super().forward, 0.0, inf, 1.0, 0.0)
        return y


class LeanLeakyReLU(nn.LeakyReLU):
    """nn.LeakyReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        y: Tensor = _TwoSlopes.apply(input, super().forward, 0.0, inf, 1.0, self.negative_slope)
        return y


class LeanHardtanh(nn.Hardtanh):
    """nn.Hardtanh that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        y: Tensor = _TwoSlopes.apply(input, super().forward, self.min_val, self.max_val, 1.0, 0.0)
        return y


class LeanReLU6(nn.ReLU6):
    """nn.ReLU6 that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        y: Tensor = _TwoSlopes.apply(input, super().forward, 0.0, 6.0, 1.0, 0.0)
        return y


class LeanHardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid, a line of slope 1/6 in (-3, 3), that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        y: Tensor = _TwoSlopes.apply(input, super().forward, -3.0, 3.0, _ONE_SIXTH, 0.0)
        return y


def _pack_outside(x: Tensor, low: float, high: float) -> tuple[Tensor, tuple[torch.Size, tuple[int, ...]]]:
    """Bits where x lies outside (low, high), and the shape and strides of the mask that they pack."""
    mask = x <= low
    layout, bits = (mask.shape, mask.stride()), pack_bits(mask)
    if high != inf:
        mask = x >= high
        bits.bitwise_or_(pack_bits(mask))
    return bits, layout


def _select(dy: Tensor, passes: Tensor, flat: float) -> Tensor:
    """dY where `passes` is not 0, dY * flat elsewhere.

    torch's own kernels want a mask of dY's type, four times as large: so an eighth of the batch at a time.
    """
    dx = torch.empty_like(dy)
    parts = (torch.atleast_1d(tensor).chunk(8) for tensor in (dy, passes, dx))
    for grad, mask, out in zip(*parts, strict=True):
        if flat:
            torch.ops.aten.leaky_relu_backward.grad_input(grad, mask.to(grad.dtype), flat, False, grad_input=out)
        else:
            torch.ops.aten.threshold_backward.grad_input(grad, mask.to(grad.dtype), 0, grad_input=out)
    return dx
