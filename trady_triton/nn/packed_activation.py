"""Activations by an op that keeps their derivative in 1, 8 or 2 bits an element (see `trady_triton.ops.act_pack`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trady_triton.ops import act_pack, act_pack_, act_unpack
from trady_triton.ops.act_pack import dense_stride

Limits = tuple[float, float] | tuple[None, None]


class _Packed(torch.autograd.Function):
    """The activation `kind` of x, in place or not, keeping the codes of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, bits: int, limits: Limits, inplace: bool) -> Tensor:
        if inplace:
            y, code = x, act_pack_(x, kind, bits, *limits)
            ctx.mark_dirty(x)
        else:
            y, code = act_pack(x, kind, bits, *limits)
        ctx.save_for_backward(code)
        ctx.kind, ctx.bits, ctx.strides = kind, bits, dense_stride(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        return act_unpack(dy, code, ctx.kind, ctx.bits, ctx.strides), None, None, None, None


def packed_activation(x: Tensor, kind: str, bits: int, limits: Limits = (None, None), inplace: bool = False) -> Tensor:
    """The activation `kind`, a key of the tables in `ops.activation`; `limits` are those of "hardtanh"."""
    if inplace and torch.compiler.is_compiling():
        # A Function that changes its input would lose its backward there, if the input comes from outside.
        y: Tensor = _Packed.apply(x, kind, bits, limits, False)
        return x.copy_(y)
    y = _Packed.apply(x, kind, bits, limits, inplace)
    return y
