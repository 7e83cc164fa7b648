"""Dropout that keeps its mask in one bit an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.graph import builds_graph
from trady_triton.nn.parts import parts
from trady_triton.ops.bits import pack_bits, unpack_bits


class _PackedDropout(torch.autograd.Function):
    """F.dropout in training, with torch's own draws: the same random state gives the same output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y, mask = _dropout(x, p)
        ctx.save_for_backward(pack_bits(mask))
        ctx.layout, ctx.scale = (mask.shape, mask.stride()), 1 / (1 - p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mask = unpack_bits(*ctx.saved_tensors, *ctx.layout)
        dx = torch.empty_like(dy)
        for grad, part, out in parts(dy, mask, dx):
            torch.mul(grad, part.ne(0).to(grad.dtype).mul_(ctx.scale), out=out)
        return dx, None


class LeanDropout(nn.Dropout):
    """nn.Dropout that keeps one bit an element, and nothing in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not (self.training and builds_graph(input) and 0 < self.p < 1) or self.inplace:
            return super().forward(input)
        y: Tensor = _PackedDropout.apply(input, self.p)
        return y


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(y, bool mask) by the kernel that F.dropout would use on the device of x."""
    if x.is_cuda:
        y, mask = torch.native_dropout(x, p, True)
        return y, mask
    noise = torch.empty_like(x).bernoulli_(1 - p)
    mask = noise.ne(0)
    return x * noise.div_(1 - p), mask
