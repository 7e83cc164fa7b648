"""SiLU, GELU and Hardswish that keep their derivative in 8 or 2 bits an element where the policy allows it.

An exact policy keeps the input, as torch does: nothing smaller is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trady_triton.nn.derivative import pack_derivative, unpack_derivative
from trady_triton.nn.graph import builds_graph
from trady_triton.policy import Policy


class _PackedActivation(torch.autograd.Function):
    """y = run(x), keeping the codes of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], kind: str, bits: int) -> Tensor:
        code, ctx.strides = pack_derivative(x, kind, bits)
        ctx.save_for_backward(code)
        ctx.kind, ctx.bits = kind, bits
        y = run(x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        return unpack_derivative(dy, code, ctx.kind, ctx.bits, ctx.strides), None, None, None


def lean_activation(
    x: Tensor, run: Callable[[Tensor], Tensor], kind: str, policy: Policy, inplace: bool = False
) -> Tensor:
    """run(x), the activation `kind` (a key of CODES), keeping what the policy allows; `inplace` if run changes x."""
    bits = policy.derivative_bits
    if bits is None or not builds_graph(x):
        return run(x)
    if inplace and torch.compiler.is_compiling():  # as in activation.py
        y: Tensor = _PackedActivation.apply(x, lambda x: run(x.clone()), kind, bits)
        return x.copy_(y)
    y = _PackedActivation.apply(x, run, kind, bits)
    return y


class LeanSiLU(nn.SiLU):
    """nn.SiLU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "silu", self.policy, self.inplace)


class LeanHardswish(nn.Hardswish):
    """nn.Hardswish whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return lean_activation(input, super().forward, "hardswish", self.policy, self.inplace)


class LeanGELU(nn.GELU):
    """nn.GELU whose derivative may be packed."""

    policy: Policy = Policy()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        kind = "gelu" if self.approximate == "none" else "gelu_tanh"
        return lean_activation(input, super().forward, kind, self.policy)
