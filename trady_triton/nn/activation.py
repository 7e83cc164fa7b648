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
from trady_triton.nn.parts import parts

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


def _two_slopes(
    module: Any, run: Callable[[Tensor], Tensor], x: Tensor, low: float, high: float, steep: float = 1.0,
    flat: float = 0.0,
) -> Tensor:  # fmt: skip
    """run(x), the plain forward of an activation module, with the derivative that `_TwoSlopes` describes."""
    if not builds_graph(x):
        return run(x)
    slopes = low, high, steep, flat
    if (
        module.inplace and torch.compiler.is_compiling()
    ):  # which loses the backward of a Function that changes its input
        y: Tensor = _TwoSlopes.apply(x, lambda x: run(x.clone()), *slopes)
        return x.copy_(y)
    y = _TwoSlopes.apply(x, run, *slopes)
    return y


class LeanReLU(nn.ReLU):
    """nn.ReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return _two_slopes(self, super().forward, input, 0.0, inf)


class LeanLeakyReLU(nn.LeakyReLU):
    """nn.LeakyReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return _two_slopes(self, super().forward, input, 0.0, inf, 1.0, self.negative_slope)


class LeanHardtanh(nn.Hardtanh):
    """nn.Hardtanh that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return _two_slopes(self, super().forward, input, self.min_val, self.max_val)


class LeanReLU6(nn.ReLU6):
    """nn.ReLU6 that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return _two_slopes(self, super().forward, input, 0.0, 6.0)


class LeanHardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid, a line of slope 1/6 in (-3, 3), that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return _two_slopes(self, super().forward, input, -3.0, 3.0, _ONE_SIXTH)


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

    In parts, because torch's own kernels want a mask of dY's type, four times as large.
    """
    dx = torch.empty_like(dy)
    for grad, mask, out in parts(dy, passes, dx):
        if flat:
            torch.ops.aten.leaky_relu_backward.grad_input(grad, mask.to(grad.dtype), flat, False, grad_input=out)
        else:
            torch.ops.aten.threshold_backward.grad_input(grad, mask.to(grad.dtype), 0, grad_input=out)
    return dx
