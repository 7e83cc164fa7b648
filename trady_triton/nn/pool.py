"""Pooling that keeps sizes, and for the maximum where in its window it was, one byte an output.

Shapes: N batch, C channels, H x W input, P x Q output, window R x S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from trady_triton.nn.graph import builds_graph


class Window(NamedTuple):
    """How a pool reads its input: pairs (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        y, indices = F.max_pool2d(x, *window, return_indices=True)
        ctx.save_for_backward(_offsets(indices, x.shape[-1], window))
        ctx.window, ctx.x_shape = window, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        indices = _indices(offsets, ctx.x_shape[-1], ctx.window)
        dx = _empty_dx(dy, ctx.x_shape)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(dy, dx, *ctx.window, indices, grad_input=dx)
        return dx, None


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.options, ctx.x_shape = options, x.shape
        return F.avg_pool2d(x, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _empty_dx(dy, ctx.x_shape)
        torch.ops.aten.avg_pool2d_backward.grad_input(dy, dx, *ctx.options, grad_input=dx)
        return dx, None


def _empty_dx(dy: Tensor, shape: torch.Size) -> Tensor:
    """What dX is written to, in the layout of dY; it also stands for x, of which a backward reads only the layout.

    A scalar expanded to the shape of x would do on the CPU; on CUDA torch makes it contiguous first, as large as x.
    """
    channels_last = dy.is_contiguous(memory_format=torch.channels_last) and not dy.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)


def lean_avg_pool2d(module: nn.AvgPool2d, x: Tensor) -> Tensor:
    """F.avg_pool2d of x [N, C, H, W] by the module, keeping nothing."""
    sizes = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
    options = (*sizes, module.ceil_mode, module.count_include_pad, module.divisor_override)
    y: Tensor = _AvgPool2d.apply(x, options) if builds_graph(x) else F.avg_pool2d(x, *options)
    return y


class LeanMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that keeps one byte an output, if its window has at most 256 places."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, H, W] -> [N, C, P, Q]."""
        kernel = _pair(self.kernel_size)
        if not builds_graph(input) or self.return_indices or kernel[0] * kernel[1] > 256:
            return super().forward(input)  # type: ignore[no-any-return]
        window = Window(kernel, _pair(self.stride), _pair(self.padding), _pair(self.dilation), self.ceil_mode)
        y: Tensor = _MaxPool2d.apply(input, window)
        return y


class LeanAvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d that keeps nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, H, W] -> [N, C, P, Q]."""
        return lean_avg_pool2d(self, input)


def _offsets(indices: Tensor, width: int, window: Window) -> Tensor:
    """Flat indices h * W + w of the maxima [..., P, Q] -> their places r * S + s in the window, uint8."""
    top, left = _corners(indices, window)
    row = (indices.div(width, rounding_mode="floor") - top).div_(window.dilation[0], rounding_mode="floor")
    column = (indices % width - left).div_(window.dilation[1], rounding_mode="floor")
    return row.mul_(window.kernel[1]).add_(column).to(torch.uint8)


def _indices(offsets: Tensor, width: int, window: Window) -> Tensor:
    """The inverse of `_offsets`."""
    top, left = _corners(offsets, window)
    place = offsets.to(torch.int64)
    row = place.div(window.kernel[1], rounding_mode="floor").mul_(window.dilation[0]).add_(top)
    column = place.remainder_(window.kernel[1]).mul_(window.dilation[1]).add_(left)
    return row.mul_(width).add_(column)


def _corners(like: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Row [P, 1] and column [Q] of the input where each output's window begins."""
    rows, columns = (torch.arange(size, device=like.device) for size in like.shape[-2:])
    return (rows * window.stride[0] - window.padding[0])[:, None], columns * window.stride[1] - window.padding[1]
