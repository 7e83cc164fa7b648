"""Piecewise linear activations that keep one bit an element: where their slope is the lesser one.

An in-place module stays in place: its caller may count on the change of x, as in pre-activation networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.graph import builds_graph
from trady_triton.nn.packed_activation import packed_activation
from trady_triton.nn.parts import parts
from trady_triton.ops.bits import pack_bits, unpack_bits


class LeanReLU(nn.ReLU):
    """nn.ReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        return packed_activation(input, "relu", 1, inplace=self.inplace)


class LeanReLU6(nn.ReLU6):
    """nn.ReLU6 that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        return packed_activation(input, "relu6", 1, inplace=self.inplace)


class LeanHardtanh(nn.Hardtanh):
    """nn.Hardtanh that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        return packed_activation(input, "hardtanh", 1, (self.min_val, self.max_val), self.inplace)


class LeanHardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid, a line of slope 1/6 in (-3, 3), that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        return packed_activation(input, "hardsigmoid", 1, inplace=self.inplace)


class LeanLeakyReLU(nn.LeakyReLU):
    """nn.LeakyReLU that keeps one bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not builds_graph(input):
            return super().forward(input)
        if self.inplace and torch.compiler.is_compiling():  # as in packed_activation.py
            y: Tensor = _Leaky.apply(input, self.negative_slope, False)
            return input.copy_(y)
        y = _Leaky.apply(input, self.negative_slope, self.inplace)
        return y


class _Leaky(torch.autograd.Function):
    """F.leaky_relu; `slope` is that of what is not above 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        mask = x <= 0
        ctx.layout, ctx.slope = (mask.shape, mask.stride()), slope
        ctx.save_for_backward(pack_bits(mask.logical_not_()))
        if inplace:
            ctx.mark_dirty(x)
            return torch.nn.functional.leaky_relu_(x, slope)
        return torch.nn.functional.leaky_relu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.empty_like(dy)
        for grad, mask, out in parts(dy, unpack_bits(*ctx.saved_tensors, *ctx.layout), dx):
            torch.ops.aten.leaky_relu_backward.grad_input(grad, mask.to(grad.dtype), ctx.slope, False, grad_input=out)
        return dx, None, None
