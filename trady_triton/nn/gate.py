"""Products x * gate of squeeze-and-excitation, which may keep x in one byte an element.

Shapes: N batch, C channels; x [N, C, H, W], gate [N, C, 1, 1].
Kept: x as uint8, of each plane its lowest value and the step of its code, and the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trady_triton.nn.graph import builds_graph
from trady_triton.nn.packed import decode, encode
from trady_triton.nn.parts import parts
from trady_triton.policy import Policy


class _PackedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(*encode(x, (2, 3)), gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        code, low, step, gate = ctx.saved_tensors
        dx = dy * gate if ctx.needs_input_grad[0] else None
        dgate = None
        if ctx.needs_input_grad[1]:
            dgate = torch.cat([_sum_product(*part) for part in parts(dy, code, low, step)]).to(gate.dtype)
        return dx, dgate


def gated(x: Tensor, gate: Tensor, policy: Policy) -> Tensor:
    """x [N, C, H, W] * gate [N, C, 1, 1], keeping what the policy allows."""
    if policy.is_exact or not builds_graph(gate) or gate.shape != (*x.shape[:2], 1, 1) or x.dtype != gate.dtype:
        return x * gate
    y: Tensor = _PackedGate.apply(x, gate)
    return y


def _sum_product(dy: Tensor, code: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Sum over the pixels of dY * x, [N, C, 1, 1]."""
    return decode(code, low, step).mul_(dy).sum((2, 3), keepdim=True)
